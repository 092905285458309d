//! Memory ordering, explored by loom: `RUSTFLAGS="--cfg loom" cargo test -p ring-proto --release`.
