//! `blkback`: serves virtual disks to other domains.

mod doctor;
mod stats_cli;

use anyhow::Context;
use blkback::config::{Config, Flags};
use blkback::daemon::Daemon;
use blkback::metrics::{Clock, ListenError, Server};
use blkback::records::Records;
use blkback::registry::Registry;
use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use xen_platform::{Choice, End, in_one_line};
use xenstore_glue::client::Client;

/// Xen block backend in user space
#[derive(Parser)]
#[command(name = "blkback", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve every disk that the toolstack attaches to this domain, until SIGTERM
    ///
    /// SIGHUP looks at the sizes of all disks. SIGTERM and SIGINT answer what is in flight and exit;
    /// the disks stay attached for the next daemon to take up. The log is set with RUST_LOG (info).
    Serve(Flags),
    /// Show what a running daemon does: requests, errors, their cost and latency, by disk and ring
    ///
    /// The daemon serves statistics where `listen` of its configuration or `serve --listen` says.
    Stats(stats_cli::Args),
    /// Tell what this host lacks for `serve` on Xen, and how to mend it; exit with 1 if it cannot work
    Doctor(doctor::Args),
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("blkback: {}", in_one_line(error.as_ref()));
        ExitCode::FAILURE
    })
}

fn run() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = match cli.command {
        Command::Serve(flags) => runtime.block_on(serve(Config::load(flags)?)),
        Command::Stats(args) => runtime.block_on(stats_cli::run(args)),
        Command::Doctor(args) => return doctor::run(&args),
    };
    // A disk that hangs while being opened must not keep a successor from serving the others.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let registry = Arc::new(Registry::default());
    let statistics = match &config.listen {
        Some(address) => match Server::bind(address, registry.clone(), Clock::start()).await {
            Ok(server) => Some(server),
            Err(error @ ListenError::InUse(_)) => return Err(error.into()),
            // Disks must be served even without statistics.
            Err(error) => {
                error!("no statistics: {}", in_one_line(&error));
                None
            }
        },
        None => None,
    };
    let (platform, endpoint) =
        config.platform.open(End::Backend).with_context(|| match &config.platform {
            Choice::Xen => "blkback doctor tells what is missing on this host".to_owned(),
            embedded => format!("become {embedded}"),
        })?;
    let records = match Records::open(&config.state_dir) {
        Ok(records) => Some(records),
        Err(error) => {
            let dir = &config.state_dir;
            warn!(?dir, %error, "no records: should this daemon be killed, frontends like Linux's lose requests");
            None
        }
    };
    let client = Client::connect(endpoint).await.context("connect to xenstore")?;
    let (stop, stopped) = watch::channel(false);
    let (rescan, rescanned) = watch::channel(());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => { let _ = rescan.send(()); }
            }
        }
        // It fails only if there are no receivers any more.
        let _ = stop.send(true);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    });
    let kinds: Vec<_> = config.kinds.iter().map(|kind| kind.as_str()).collect();
    let kinds = kinds.join(",");
    info!(domain = %platform.domid(), kinds = %kinds, "serving");
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!(%error, "cannot tell the service manager");
    }
    let daemon = Daemon {
        client,
        platform,
        kinds: config.kinds,
        tuning: config.tuning,
        registry,
        records,
        resize_interval: config.resize_interval,
    };
    let statistics = async {
        match statistics {
            Some(server) => server.run().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // Statistics are served even while it drains.
        served = daemon.serve(stopped, rescanned) => served.context("xenstore")?,
        never = statistics => match never {},
    }
    info!("done");
    Ok(())
}
