//! What to do, in fio's terms.

use crate::cli::units;
use anyhow::{anyhow, bail};
use blkfront::Geometry;
use ring_proto::abi::SECTOR_SIZE;
use serde::Serialize;
use std::time::Duration;

/// How long a job runs if given neither a size nor a time.
const DEFAULT_RUNTIME: Duration = Duration::from_secs(10);
/// `iometer-file-access-server.fio`, which comes with fio.
const IOMETER_BSSPLIT: &str = "512/10:1k/5:2k/5:4k/60:8k/2:16k/4:32k/4:64k/10";
const IOMETER_READS: u8 = 80;
/// Its queue depth for a moderate load.
const IOMETER_DEPTH: usize = 64;

/// fio's `rw`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Random reads
    Randread,
    /// Random writes
    Randwrite,
    /// Sequential, reads and writes mixed
    #[value(alias = "readwrite")]
    Rw,
    /// Random, reads and writes mixed
    Randrw,
}

/// A whole job by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Profile {
    /// Random, 80 % reads, 512 bytes to 64 KiB, depth 64
    IometerFileAccessServer,
}

/// fio's `verify`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verify {
    /// Each block carries its place, a sequence number and a checksum
    Crc32c,
}

/// fio's job options, under fio's names.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Job (as in fio)")]
pub(crate) struct JobArgs {
    /// A known job; options beside it change it
    #[arg(long, value_enum)]
    profile: Option<Profile>,
    /// Pattern [default: randread]
    #[arg(long, visible_alias = "readwrite", value_enum)]
    rw: Option<Pattern>,
    /// Per cent of reads in a mixed pattern [default: 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: Option<u8>,
    /// Block size [default: 4k]
    #[arg(long, value_name = "SIZE", value_parser = units::size::<u64>, conflicts_with = "bssplit")]
    bs: Option<u64>,
    /// Block sizes and their shares in per cent: 512/10:4k/60:64k/30
    #[arg(long, value_name = "SPLIT")]
    bssplit: Option<String>,
    /// I/Os each job keeps in flight [default: 1]
    #[arg(long, value_name = "N")]
    iodepth: Option<usize>,
    /// Jobs: vCPUs, a thread each
    #[arg(long, value_name = "N", default_value_t = 1)]
    numjobs: u32,
    /// Taken for fio's sake: there is no page cache to go around
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "1", value_parser = units::boolean)]
    direct: Option<bool>,
    /// Bytes each job transfers, and the size of its part of the disk [default: its share]
    #[arg(long, value_name = "SIZE", value_parser = units::size::<u64>)]
    size: Option<u64>,
    /// Where on the disk the first job's part begins
    #[arg(long, value_name = "SIZE", value_parser = units::size::<u64>, default_value = "0")]
    offset: u64,
    /// The longest a job runs [default: 10 s where there is neither a size nor anything to verify]
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    runtime: Option<Duration>,
    /// Go on until the runtime is over, again from the start if need be
    #[arg(
        long = "time_based",
        alias = "time-based",
        num_args = 0..=1,
        require_equals = true,
        default_value = "0",
        default_missing_value = "1",
        value_parser = units::boolean
    )]
    time_based: bool,
    /// Run for that long first, and do not count it
    #[arg(
        long = "ramp_time",
        alias = "ramp-time",
        value_name = "TIME",
        value_parser = units::time,
        default_value = "0"
    )]
    ramp_time: Duration,
    /// I/Os a second that each job does not go above
    #[arg(long = "rate_iops", alias = "rate-iops", value_name = "N")]
    rate_iops: Option<u64>,
    /// Check what is read against what was written, and in the end read all that was written
    #[arg(long, value_enum)]
    verify: Option<Verify>,
    /// Seed of places, sizes and data: the same one does the same again
    #[arg(long, value_name = "N", default_value_t = 1)]
    randseed: u64,
}

/// A block size and its share.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Share {
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// Of 100.
    pub(crate) percent: u8,
}

/// A validated job.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Job {
    pub(crate) profile: Option<Profile>,
    pub(crate) rw: Pattern,
    pub(crate) rwmixread: u8,
    pub(crate) bssplit: Vec<Share>,
    pub(crate) iodepth: usize,
    pub(crate) numjobs: u32,
    pub(crate) offset: u64,
    /// Per job, once it is known: see [`Job::fit`].
    pub(crate) size: Option<u64>,
    #[serde(serialize_with = "seconds")]
    pub(crate) runtime: Option<Duration>,
    pub(crate) time_based: bool,
    #[serde(serialize_with = "seconds")]
    pub(crate) ramp_time: Duration,
    pub(crate) rate_iops: Option<u64>,
    pub(crate) verify: Option<Verify>,
    pub(crate) randseed: u64,
}

fn seconds<T, S>(time: &T, to: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Into<Option<Duration>>,
    S: serde::Serializer,
{
    (*time).into().map(|time| time.as_secs_f64()).serialize(to)
}

impl Job {
    pub(crate) fn new(args: &JobArgs) -> anyhow::Result<Self> {
        let iometer = args.profile.is_some();
        let bssplit = match (&args.bssplit, args.bs) {
            (Some(split), _) => parse_split(split)?,
            (None, Some(bytes)) => vec![Share { bytes, percent: 100 }],
            (None, None) if iometer => parse_split(IOMETER_BSSPLIT)?,
            (None, None) => vec![Share { bytes: 4096, percent: 100 }],
        };
        if let Some(wrong) = bssplit.iter().find(|b| !whole(b.bytes) || b.bytes == 0) {
            bail!("block size {} is no multiple of {SECTOR_SIZE}", wrong.bytes);
        }
        let smallest = bssplit.iter().map(|b| b.bytes).min().unwrap_or_default();
        let uneven = bssplit.iter().find(|b| !b.bytes.is_multiple_of(smallest));
        if let (Some(_), Some(uneven)) = (args.verify, uneven) {
            bail!(
                "verify checks blocks of {smallest}, the smallest, and {} is no multiple of that",
                uneven.bytes
            );
        }
        let timed = args.size.is_none() && args.verify.is_none();
        if args.time_based && args.runtime.is_none() {
            bail!("time_based needs a runtime");
        }
        if args.numjobs == 0 {
            bail!("numjobs is 0");
        }
        if args.rate_iops == Some(0) {
            bail!("rate_iops is 0");
        }
        Ok(Self {
            profile: args.profile,
            rw: args.rw.unwrap_or(if iometer { Pattern::Randrw } else { Pattern::Randread }),
            rwmixread: args.rwmixread.unwrap_or(if iometer { IOMETER_READS } else { 50 }),
            bssplit,
            iodepth: args.iodepth.unwrap_or(if iometer { IOMETER_DEPTH } else { 1 }),
            numjobs: args.numjobs,
            offset: args.offset,
            size: args.size,
            runtime: args.runtime.or(timed.then_some(DEFAULT_RUNTIME)),
            time_based: args.time_based || (timed && args.runtime.is_none()),
            ramp_time: args.ramp_time,
            rate_iops: args.rate_iops,
            verify: args.verify,
            randseed: args.randseed,
        })
    }

    /// The same job with its size set, cut to fit the disk.
    pub(crate) fn fit(mut self, disk: &Geometry) -> anyhow::Result<Self> {
        let unit = u64::from(disk.sector_size);
        if let Some(wrong) = self.bssplit.iter().find(|b| !b.bytes.is_multiple_of(unit)) {
            bail!("block size {} is no multiple of the disk's sectors of {unit}", wrong.bytes);
        }
        if disk.read_only && self.rw.writes() {
            bail!("the disk is read-only: only read and randread can be done");
        }
        let room = disk.size.saturating_sub(self.offset) / u64::from(self.numjobs);
        if let Some(size) = self.size.filter(|size| *size > room) {
            tracing::warn!("a size of {size} is cut to {room} bytes, a job's share of the disk");
        }
        let size = self.size.unwrap_or(room).min(room);
        let size = size - size % self.min_block();
        if size < self.max_block() || !self.offset.is_multiple_of(unit) {
            return Err(anyhow!(
                "{} jobs from offset {} have {room} bytes each of the disk's {}: too few, or not aligned",
                self.numjobs,
                self.offset,
                disk.size
            ));
        }
        self.size = Some(size);
        Ok(self)
    }

    pub(crate) fn min_block(&self) -> u64 {
        self.bssplit.iter().map(|b| b.bytes).min().unwrap_or(SECTOR_SIZE as u64)
    }

    pub(crate) fn max_block(&self) -> u64 {
        self.bssplit.iter().map(|b| b.bytes).max().unwrap_or(SECTOR_SIZE as u64)
    }

    /// The size of the largest block, in whole pages.
    pub(crate) fn buffer_bytes(&self) -> usize {
        let bytes = usize::try_from(self.max_block()).unwrap_or(usize::MAX);
        bytes.checked_next_multiple_of(ring_proto::abi::PAGE_SIZE).unwrap_or(usize::MAX)
    }
}

impl Pattern {
    pub(crate) fn random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw)
    }

    pub(crate) fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::Randread)
    }

    pub(crate) fn reads(self) -> bool {
        !matches!(self, Self::Write | Self::Randwrite)
    }
}

fn whole(bytes: u64) -> bool {
    bytes.is_multiple_of(SECTOR_SIZE as u64)
}

/// Reads `SIZE/PERCENT:SIZE/PERCENT:…`; sizes without a share split the rest evenly, as in fio.
fn parse_split(text: &str) -> anyhow::Result<Vec<Share>> {
    let mut shares = Vec::new();
    for part in text.split(':') {
        let (size, percent) = part.split_once('/').unwrap_or((part, ""));
        let bytes = units::size(size).map_err(|e| anyhow!("bssplit {text:?}: {e}"))?;
        let percent = match percent {
            "" => None,
            percent => match percent.parse::<u8>() {
                Ok(percent) if percent <= 100 => Some(percent),
                _ => bail!("bssplit {text:?}: {percent:?} is no share in per cent"),
            },
        };
        shares.push((bytes, percent));
    }
    let given: u32 = shares.iter().filter_map(|(_, percent)| percent.map(u32::from)).sum();
    let open = shares.iter().filter(|(_, percent)| percent.is_none()).count() as u32;
    let left = 100u32.checked_sub(given).ok_or_else(|| anyhow!("bssplit {text:?}: above 100 %"))?;
    if open == 0 && left > 0 {
        bail!("bssplit {text:?}: {given} % and not 100");
    }
    let mut spare = left.checked_rem(open).unwrap_or(0);
    let each = left.checked_div(open).unwrap_or(0);
    let mut share = |percent: Option<u8>| {
        percent.unwrap_or_else(|| {
            let extra = u32::from(spare > 0);
            spare -= extra;
            (each + extra) as u8
        })
    };
    Ok(shares
        .into_iter()
        .map(|(bytes, percent)| Share { bytes, percent: share(percent) })
        .filter(|share| share.percent > 0)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{Job, JobArgs, parse_split};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        job: JobArgs,
    }

    fn job(options: &[&str]) -> anyhow::Result<Job> {
        Job::new(&Line::parse_from([&["bench"], options].concat()).job)
    }

    #[test]
    fn blocks_that_cannot_be_verified_are_refused() {
        let refused = job(&["--verify=crc32c", "--bssplit=4k/50:6k/50"]).unwrap_err();
        assert!(refused.to_string().contains("6144 is no multiple"), "{refused}");
        assert!(job(&["--verify=crc32c", "--bssplit=4k/50:12k/50"]).is_ok());
        assert!(job(&["--bssplit=4k/50:6k/50"]).is_ok());
    }

    #[test]
    fn a_split_is_read_as_fio_does() {
        let read = |text| {
            parse_split(text).map(|split| {
                split.iter().map(|share| (share.bytes, share.percent)).collect::<Vec<_>>()
            })
        };
        let iometer = read(super::IOMETER_BSSPLIT).unwrap();
        assert_eq!(iometer.len(), 8);
        assert_eq!(iometer[3], (4096, 60));
        assert_eq!(read("4k/50:1k/:32k/").unwrap(), [(4096, 50), (1024, 25), (32768, 25)]);
        assert_eq!(read("4k").unwrap(), [(4096, 100)]);
        for wrong in ["4k/101", "4k/60:8k/60", "4k/50", "x/100", "", "4k/-1"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }
}
