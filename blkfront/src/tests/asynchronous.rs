//! Tasks that share a queue.

use super::*;
use crate::{AsyncQueue, Io};
use std::rc::Rc;

#[test]
fn more_tasks_than_places_all_get_their_turn() {
    const TASKS: u64 = 300;
    let mut rig = Rig::new(small(1), 1);
    let _backend = rig.connect(UNION, Rig::limits(UNION, 0, FlushMode::None), Conduct::Good);
    let queue = rig.queue(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        let queue = Rc::new(AsyncQueue::new(queue).unwrap());
        let driver = queue.clone();
        let driver = tokio::task::spawn_local(async move { driver.drive().await });
        let task = |n: u64| {
            let queue = queue.clone();
            let mut buffer = queue.alloc(512).unwrap();
            async move {
                buffer.write(0, &[n as u8; 512]);
                let written = queue.run(Io::write(n, n * 512, buffer)).await.unwrap();
                written.result.unwrap();
                // Without a volatile cache this completes without the backend.
                queue.run(Io::flush(n)).await.unwrap().result.unwrap();
                let read = Io::read(n, n * 512, written.buffer.unwrap());
                let read = queue.run(read).await.unwrap();
                let mut sector = [0; 512];
                read.buffer.unwrap().read(0, &mut sector);
                assert_eq!((read.cookie, sector), (n, [n as u8; 512]));
            }
        };
        let all: Vec<_> = (0..TASKS).map(|n| tokio::task::spawn_local(task(n))).collect();
        for task in all {
            task.await.unwrap();
        }
        driver.abort();
    });
}
