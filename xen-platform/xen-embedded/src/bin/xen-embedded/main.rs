//! `xen-embedded`: a stand-in for a Xen host, and its toolstack.

mod disks;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use xen_embedded::broker;
use xen_platform::embedded::control::{self, Answer, Command, NewDomain, OnCrash};
use xen_platform::in_one_line;

/// A stand-in for a Xen host: domains whose memory, grants, event channels and xenstore live in
/// ordinary processes of this machine.
#[derive(Parser)]
#[command(name = "xen-embedded", version)]
struct Cli {
    /// Where the broker keeps its sockets
    #[arg(long, global = true, default_value = "/run/xen-embedded")]
    dir: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Run the broker in the foreground
    Serve,
    /// Attach a disk to a guest and wait for its backend
    Attach {
        /// Name or number of the domain that gets the disk
        guest: String,
        /// A disk in xl's syntax, such as 'vdev=xvda,format=raw,target=null:64G'
        disk: String,
        /// Do not wait for the backend
        #[arg(long)]
        no_wait: bool,
    },
    /// Detach a disk from a guest
    Detach {
        /// Name or number of the domain that has the disk
        guest: String,
        /// The disk, such as xvda or 51712
        vdev: String,
        /// Remove it even if the backend does not let go
        #[arg(long)]
        force: bool,
    },
    /// List disks, of all domains or of some
    List {
        /// Names or numbers
        guests: Vec<String>,
    },
    /// Create, destroy and list domains
    #[command(subcommand)]
    Domain(DomainAction),
    /// Restart xenstore under everybody who uses it, to see that they survive it
    ///
    /// Every connection is closed, with its watches and transactions, and xenstore listens again
    /// at once. What is stored stays, as it does when xenstored is updated live. Disks go on:
    /// clients connect again, register their watches again and repeat what was not answered.
    XenstoreRestart,
}

#[derive(Subcommand)]
enum DomainAction {
    /// Create a domain and print its number
    Create(CreateArgs),
    /// Kill a domain's process and remove the domain with its devices
    Destroy {
        /// Name or number
        domain: String,
    },
    /// List domains
    List,
}

#[derive(Args)]
struct CreateArgs {
    /// Its name
    name: String,
    /// Memory that it can share, such as 64M
    #[arg(long, default_value = "256M", value_parser = xenstore_glue::disk::parse_size)]
    memory: u64,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// The domain serves devices to others
    #[arg(long)]
    driver_domain: bool,
    /// When its process ends [default: destroy, or preserve for a driver domain]
    #[arg(long, value_enum)]
    on_crash: Option<CrashPolicy>,
    /// Its number [default: the next free one]
    #[arg(long)]
    domid: Option<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum CrashPolicy {
    /// Destroy the domain
    Destroy,
    /// Keep it for another process
    Preserve,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy();
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done =
        runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(run(cli)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xen-embedded: {}", in_one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    match cli.action {
        Action::Serve => serve(&cli.dir).await,
        Action::Attach { guest, disk, no_wait } => {
            disks::attach(&cli.dir, &guest, &disk, !no_wait).await
        }
        Action::Detach { guest, vdev, force } => {
            disks::detach(&cli.dir, &guest, &vdev, force).await
        }
        Action::List { guests } => disks::list(&cli.dir, &guests).await,
        Action::Domain(DomainAction::Create(args)) => create(&cli.dir, args),
        Action::Domain(DomainAction::Destroy { domain }) => {
            let domid = control::find_domain(&cli.dir, &domain)?.0;
            control::ask(&cli.dir, &Command::DestroyDomain { domid })?;
            Ok(())
        }
        Action::Domain(DomainAction::List) => list(&cli.dir),
        Action::XenstoreRestart => {
            control::ask(&cli.dir, &Command::RestartXenstore)?;
            Ok(())
        }
    }
}

async fn serve(dir: &Path) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let shutdown = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    // Whoever started us reads this line, which does not depend on the log level.
    let ready = || println!("xen-embedded is ready in {}", dir.display());
    broker::serve(dir, ready, shutdown).await?;
    Ok(())
}

fn create(dir: &Path, args: CreateArgs) -> Result<()> {
    let on_crash = match args.on_crash {
        Some(CrashPolicy::Destroy) => OnCrash::Destroy,
        Some(CrashPolicy::Preserve) => OnCrash::Preserve,
        None if args.driver_domain => OnCrash::Preserve,
        None => OnCrash::Destroy,
    };
    let new = NewDomain {
        name: args.name,
        domid: args.domid,
        memory: args.memory,
        vcpus: args.vcpus,
        driver_domain: args.driver_domain,
        on_crash,
    };
    match control::ask(dir, &Command::CreateDomain(new))? {
        Answer::Domain(info) => println!("{}", info.domid),
        other => bail!("unexpected answer {other:?}"),
    }
    Ok(())
}

fn list(dir: &Path) -> Result<()> {
    println!(
        "{:<24} {:>5} {:>8} {:>6} {:>6} {:>8}  On crash",
        "Name", "ID", "Mem MiB", "VCPUs", "Ports", "Process"
    );
    for d in control::list_domains(dir)? {
        let process = d.process.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let on_crash = match d.on_crash {
            OnCrash::Destroy => "destroy",
            OnCrash::Preserve => "preserve",
        };
        let kind = if d.driver_domain { ", driver domain" } else { "" };
        println!(
            "{:<24} {:>5} {:>8} {:>6} {:>6} {:>8}  {on_crash}{kind}",
            d.name,
            d.domid,
            d.memory >> 20,
            d.vcpus,
            d.ports,
            process
        );
    }
    Ok(())
}
