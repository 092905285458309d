//! The `xenstore-rs` crate, whose blocking client is independent of libxenstore too.
//!
//! It finds its socket only through the environment, so these tests run themselves again as a child.
//! Its tokio client stops for good once nine or more events are pending (0.8.0), so the child takes
//! each event before it causes the next.

use std::io;

use futures::StreamExt;
use xenstore_rs::tokio::XsTokio;
use xenstore_rs::unix::XsUnix;
use xenstore_rs::{AsyncWatch, AsyncXs, Xs};

use crate::{Host, program, soon};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn works_against_the_store() {
    let host = Host::new();
    let mut child = program(std::env::current_exe().unwrap(), &host.socket(0));
    let child = child.args(["--ignored", "--exact", "xenstore_rs_crate::child"]);
    let output = soon(child.output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    let left = host.server.with_store(|store| store.directory("/from")).unwrap();
    assert_eq!(left, ["blocking", "tokio"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs XENSTORED_PATH: run by works_against_the_store"]
async fn child() -> io::Result<()> {
    let blocking = XsUnix::new()?;
    Xs::write(&blocking, "/from/blocking", "yes")?;
    assert_eq!(&*Xs::read(&blocking, "/from/blocking")?, "yes");
    let missing = Xs::read(&blocking, "/nothing").unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);

    let client = XsTokio::new().await?;
    let mut watch = client.watch("/from").await?;
    assert_eq!(watch.next().await.as_deref(), Some("/from"));
    for round in 0..20 {
        AsyncXs::write(&client, "/from/tokio", &round.to_string()).await?;
        assert_eq!(watch.next().await.as_deref(), Some("/from/tokio"));
    }
    assert_eq!(AsyncXs::directory(&client, "/from").await?.len(), 2);
    AsyncXs::write(&client, "/gone", "").await?;
    AsyncXs::rm(&client, "/gone").await?;
    assert!(AsyncXs::read(&client, "/gone").await.is_err());
    Ok(())
}
