//! The memory files that domains share.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::OwnedFd;
use xen_platform::{Error, Result};

/// A sparse, zeroed, anonymous file of `bytes` bytes.
///
/// Its size is sealed: a process that could shrink it would kill, by SIGBUS, every other that maps it.
pub(super) fn memory_file(name: &str, bytes: usize) -> Result<OwnedFd> {
    let failed = |e| Error::io(format!("create {bytes} bytes of memory for {name}"), e);
    let size = i64::try_from(bytes).map_err(|_| failed(nix::Error::EFBIG))?;
    let file =
        memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).map_err(failed)?;
    nix::unistd::ftruncate(&file, size).map_err(failed)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
    Ok(file)
}
