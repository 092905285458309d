//! How to talk to the backend.

use blkfront::{Config, DEFAULT_SPIN, Protocol, Waiting};
use ring_proto::Abi;
use std::time::Duration;

/// How a thread waits for responses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub(crate) enum Wait {
    /// Spin, and never sleep; for bench alone
    Poll,
    /// Sleep at once
    Event,
    /// Spin as long as it pays, then sleep
    #[default]
    Adaptive,
}

/// Values of the key `protocol`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ProtocolName {
    #[value(name = "x86_64-abi")]
    X86_64,
    #[value(name = "x86_32-abi")]
    X86_32,
    /// No such key
    None,
}

/// How to talk to the backend.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Rings")]
pub(crate) struct Rings {
    /// Rings [default: one a vCPU, or as many as the backend takes]
    #[arg(long, value_name = "N")]
    queues: Option<u32>,
    /// log2 of the pages of a ring, 0 to 4, or less if the backend takes less
    #[arg(long, value_name = "N", default_value_t = 0)]
    ring_order: u8,
    /// Use the split ring layout if the backend knows it
    #[arg(long)]
    split: bool,
    /// The most segments of an indirect request; 0 for none
    #[arg(long, value_name = "N", default_value_t = blkfront::DEFAULT_INDIRECT_SEGMENTS)]
    indirect: u16,
    /// Do not offer persistent grants
    #[arg(long)]
    no_persistent: bool,
    /// Do not offer to issue requests again: be to the backend what Linux's frontend is
    #[arg(long, hide = true)]
    no_reissue: bool,
    /// Be to the backend what a frontend of another ABI is, or an old one that names none
    #[arg(long, hide = true, value_enum)]
    protocol: Option<ProtocolName>,
    /// How threads wait for responses
    #[arg(long, value_enum, default_value_t)]
    wait: Wait,
    /// Same as --wait=poll
    #[arg(long, conflicts_with = "wait")]
    poll: bool,
    /// Longest spin of adaptive waiting, in microseconds
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SPIN.as_micros() as u64)]
    spin_us: u64,
    /// Seconds that the backend is given to connect, and to let go at the end
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    connect_timeout: u64,
    /// Seconds that I/O waits, before it fails, for a backend that said it goes, or that comes after one that was
    /// killed [default: for ever]
    #[arg(long, value_name = "SECONDS")]
    reconnect_timeout: Option<u64>,
}

impl Rings {
    pub(crate) fn wait(&self) -> Wait {
        if self.poll { Wait::Poll } else { self.wait }
    }

    pub(crate) fn config(&self, vcpus: u32) -> Config {
        Config {
            vcpus,
            queues: self.queues,
            ring_order: self.ring_order,
            persistent: !self.no_persistent,
            split_ring: self.split,
            max_indirect_segments: self.indirect,
            reissue: !self.no_reissue,
            protocol: match self.protocol {
                None => Protocol::default(),
                Some(ProtocolName::X86_64) => Protocol::Named(Abi::X86_64),
                Some(ProtocolName::X86_32) => Protocol::Named(Abi::X86_32),
                Some(ProtocolName::None) => Protocol::Unnamed,
            },
            waiting: match self.wait() {
                Wait::Poll => Waiting::Poll,
                Wait::Event => Waiting::Event,
                Wait::Adaptive => Waiting::Adaptive(Duration::from_micros(self.spin_us)),
            },
            connect_timeout: Duration::from_secs(self.connect_timeout),
            reconnect_timeout: self.reconnect_timeout.map(Duration::from_secs),
            ..Config::default()
        }
    }
}
