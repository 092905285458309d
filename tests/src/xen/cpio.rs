//! Initramfs archives: cpio in the `newc` format (Linux's `Documentation/driver-api/early-userspace`).

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
/// Names and contents start on multiples of this.
const ALIGN: usize = 4;

/// An archive being written, not compressed: an emulated CPU takes longer to unpack than to copy.
///
/// Directories above an entry are added before it.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    inode: u32,
    names: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0, names: BTreeSet::new() }
    }

    /// Whether an entry of this name was added.
    pub fn contains(&self, name: &Path) -> bool {
        self.names.contains(name)
    }

    /// Adds a directory. Adding it twice is no error.
    ///
    /// # Errors
    /// As for writing.
    pub fn directory(&mut self, name: &Path) -> io::Result<()> {
        if name.as_os_str().is_empty() || self.contains(name) {
            return Ok(());
        }
        self.entry(name, DIRECTORY | 0o755, &[])
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As for writing.
    pub fn link(&mut self, name: &Path, to: &str) -> io::Result<()> {
        self.entry(name, LINK | 0o777, to.as_bytes())
    }

    /// Adds a file, permissions 0755 or 0644.
    ///
    /// # Errors
    /// As for writing.
    pub fn file(&mut self, name: &Path, executable: bool, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | if executable { 0o755 } else { 0o644 }, content)
    }

    /// Writes the end and returns what the archive was written to.
    ///
    /// # Errors
    /// As for writing.
    pub fn finish(mut self) -> io::Result<W> {
        self.header(Path::new("TRAILER!!!"), 0, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
        if let Some(parent) = name.parent() {
            self.directory(parent)?;
        }
        self.names.insert(name.to_owned());
        self.inode += 1;
        self.header(name, mode, content.len())?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn header(&mut self, name: &Path, mode: u32, size: usize) -> io::Result<()> {
        let name = name.as_os_str().as_encoded_bytes();
        let links = 1;
        // magic, inode, mode, uid, gid, links, mtime, size, device, special device, name, check
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:016x}{:016x}{:08x}{:08x}",
            self.inode,
            0,
            0,
            0,
            0,
            0,
            name.len() + 1,
            0
        );
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name)?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let missing = written.next_multiple_of(ALIGN) - written;
        self.out.write_all(&[0; ALIGN][..missing])
    }
}
