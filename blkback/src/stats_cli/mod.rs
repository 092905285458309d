//! `blkback stats`: what a running daemon does, for people and for scripts.

mod table;
mod units;

use anyhow::Context;
use blkback::config;
use blkback::metrics::{Address, DEFAULT_ADDRESS, FetchError, Snapshot, fetch};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// Arguments of `blkback stats`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the daemon serves them: `unix:PATH` or `HOST:PORT` [default: `listen` of the
    /// configuration file, or else unix:/run/blkback/stats.sock]
    #[arg(long, value_name = "ADDRESS")]
    from: Option<Address>,
    /// Configuration file of the daemon [default: /etc/blkback.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the JSON document as the daemon serves it; with --watch one a line
    #[arg(long)]
    json: bool,
    /// Print rates every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    watch: Option<u64>,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let address = match args.from {
        Some(address) => address,
        None => match config::listen_address(args.config.as_deref())? {
            Some(address) => address,
            None => DEFAULT_ADDRESS.parse()?,
        },
    };
    let mut last = None;
    let mut ticks = interval(Duration::from_secs(args.watch.unwrap_or(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = read(&address).await?;
        let text = match (args.json, args.watch) {
            (true, None) => format!("{}\n", serde_json::to_string_pretty(&now)?),
            (true, Some(_)) => format!("{}\n", serde_json::to_string(&now)?),
            (false, None) => table::totals(&now),
            (false, Some(_)) => match &last {
                Some(last) => table::rates(last, &now),
                None => String::new(),
            },
        };
        match print(&text) {
            // The reader, such as `head`, has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            printed => printed.context("print")?,
        }
        if args.watch.is_none() {
            return Ok(());
        }
        last = Some(now);
    }
}

async fn read(address: &Address) -> anyhow::Result<Snapshot> {
    match fetch(address).await {
        Err(error @ FetchError::Connect(..)) => Err(error).context(format!(
            "no daemon serves statistics at {address}: start it with --listen {address}, \
             or with listen = \"{address}\" in {}, or say --from where it does",
            config::DEFAULT_PATH
        )),
        read => Ok(read?),
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
