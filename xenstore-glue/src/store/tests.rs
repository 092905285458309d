use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::wire::Path;

/// Checks that the tree is consistent and the counts of owned nodes are right.
fn check(store: &Store) {
    let mut owned: HashMap<u16, usize> = HashMap::new();
    for path in store.tree.find(|_| true) {
        let node = store.tree.get(&path).unwrap();
        *owned.entry(node.first.domid).or_default() += 1;
        if &*path != "/" && !path.starts_with('@') {
            let parent = store.tree.get(tree::parent(&path)).expect("parents exist");
            assert!(parent.children.contains(tree::name(&path)), "{path} is listed");
        }
        for name in &node.children {
            assert!(store.tree.get(&tree::child(&path, name)).is_some(), "{path}/{name} exists");
        }
    }
    for (domid, count) in owned {
        assert_eq!(store.tree.owned(domid), count, "nodes of domain {domid}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Request { connection: usize, transaction: usize, request: Request },
    Release(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let path = prop_oneof!["/[ab](/[ab]){0,3}", "[ab](/[ab]){0,2}", Just("/".into())]
        .prop_map(|text: String| Path::new(&text).unwrap());
    let perm = (0..4u16, prop_oneof![Just(Access::None), Just(Access::Both)])
        .prop_map(|(domid, access)| Perm { domid, access });
    let request = (path, vec(perm, 1..3), 0..10u8).prop_map(|(path, perms, which)| match which {
        0 | 1 => Request::Write { path, value: b"value".to_vec() },
        2 => Request::Mkdir(path),
        3 => Request::Rm(path),
        4 => Request::SetPerms { path, perms },
        5 => Request::Directory(path),
        6 => Request::Watch { path, token: b"token".to_vec() },
        7 | 8 => Request::TransactionEnd { commit: which == 7 },
        _ => Request::TransactionStart,
    });
    prop_oneof![
        30 => (0..4usize, 0..3usize, request).prop_map(|(connection, transaction, request)| {
            Step::Request { connection, transaction, request }
        }),
        1 => (1..4u16).prop_map(Step::Release),
    ]
}

proptest! {
    #[test]
    fn any_requests_leave_the_store_whole(steps in vec(step(), 1..150)) {
        let mut store = Store::new();
        let open = [Perm::new(0, Access::Both)];
        store.set_perms("/", &open).unwrap();
        let mut connections = Vec::new();
        let mut transactions: Vec<Vec<u32>> = vec![vec![0]; 4];
        for domid in 0..4 {
            let _ = store.introduce(domid);
            connections.push(store.connect(domid).unwrap());
        }
        for step in steps {
            match step {
                Step::Request { connection, transaction, request } => {
                    let known = &mut transactions[connection];
                    let starts = request == Request::TransactionStart;
                    let tx_id = if starts { 0 } else { known[transaction % known.len()] };
                    let ends = matches!(request, Request::TransactionEnd { .. });
                    let reply = store.handle(connections[connection], tx_id, request);
                    if let Reply::TransactionStart(id) = reply {
                        known.push(id);
                    } else if ends && tx_id != 0 {
                        known.retain(|id| *id != tx_id);
                    }
                }
                Step::Release(domid) => {
                    store.release(domid).unwrap();
                    check(&store);
                    for path in store.tree.find(|_| true) {
                        let perms = store.get_perms(&path).unwrap();
                        prop_assert!(perms.iter().all(|perm| perm.domid != domid));
                    }
                    store.introduce(domid).unwrap();
                    connections[usize::from(domid)] = store.connect(domid).unwrap();
                    transactions[usize::from(domid)] = vec![0];
                }
            }
            check(&store);
        }
    }
}
