//! The guest image's initrd with this program and its libraries before it: a cpio archive (newc,
//! Documentation/driver-api/early-userspace/buffer-format.rst of the kernel), of which an initrd may
//! have several in turn.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::super::world::World;

/// Where the program is in the guest: with its own loader and libraries, whatever the image has.
const DIR: &str = "bench";
/// The guest's command line of the load generators.
pub(super) const AGENT: &str = "/bench/loader --library-path /bench /bench/lanlet bench-peer agent";

/// The path of an initrd that has everything. Made once.
///
/// # Errors
/// A file can't be read, or written.
pub(super) fn with_agent(world: &World, initrd: &Path) -> Result<PathBuf, String> {
    let path = world.log("initrd");
    if path.exists() {
        return Ok(path);
    }
    let program = read(world.program())?;
    let parts = Parts::of(&program)?;
    let loader = parts
        .interpreter
        .ok_or("this program has no loader: VMs take one that is linked dynamically")?;
    let mut archive = Archive::default();
    archive.directory(DIR);
    archive.file("lanlet", &loaded(&program, parts.end));
    archive.file("loader", &read(Path::new(&loader))?);
    for library in libraries()? {
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&name, &read(&library)?);
    }
    let mut bytes = archive.finish();
    bytes.extend(read(initrd)?);
    fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Shared libraries of this process, by its mappings.
fn libraries() -> Result<BTreeSet<PathBuf>, String> {
    let maps = read(Path::new("/proc/self/maps"))?;
    let maps = String::from_utf8_lossy(&maps).into_owned();
    let paths = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    let is_library = |path: &&str| path.starts_with('/') && path.contains(".so");
    Ok(paths.filter(is_library).map(PathBuf::from).collect())
}

/// What of a program's file is needed to run it.
#[derive(PartialEq, Eq, Debug)]
struct Parts {
    /// Path of its loader; `None`: it needs none.
    interpreter: Option<String>,
    /// Where the last segment ends in the file. What follows is for debuggers.
    end: usize,
}

impl Parts {
    /// Reads the program headers (elf(5)) of a 64-bit little-endian program.
    fn of(program: &[u8]) -> Result<Self, String> {
        const ELF64_LITTLE: &[u8] = b"\x7fELF\x02\x01";
        const PT_INTERP: usize = 3;
        let broken = || "this program is no 64-bit little-endian ELF file".to_owned();
        let number = |at: usize, len: usize| -> Option<usize> {
            let bytes = program.get(at..at.checked_add(len)?)?;
            let value = bytes
                .iter()
                .rev()
                .fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
            usize::try_from(value).ok()
        };
        if !program.starts_with(ELF64_LITTLE) {
            return Err(broken());
        }
        let header = |index: usize| -> Option<(usize, usize, usize)> {
            let at = number(32, 8)? + index * number(54, 2)?;
            Some((number(at, 4)?, number(at + 8, 8)?, number(at + 32, 8)?))
        };
        let mut parts = Self {
            interpreter: None,
            end: 0,
        };
        for index in 0..number(56, 2).ok_or_else(broken)? {
            let (kind, offset, len) = header(index).ok_or_else(broken)?;
            let bytes = program.get(offset..offset + len).ok_or_else(broken)?;
            parts.end = parts.end.max(offset + len);
            if kind == PT_INTERP {
                let path = bytes.strip_suffix(b"\0").unwrap_or(bytes);
                parts.interpreter = Some(String::from_utf8_lossy(path).into_owned());
            }
        }
        Ok(parts)
    }
}

/// The program without what follows its segments: the guest's memory is small. Its section headers,
/// which are there, are declared away (e_shoff, e_shnum and e_shstrndx are 0).
fn loaded(program: &[u8], end: usize) -> Vec<u8> {
    let mut loaded = program[..end].to_vec();
    loaded[40..48].fill(0);
    loaded[60..64].fill(0);
    loaded
}

/// A cpio archive in the making.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    /// Numbers of files, so that none is a link to another.
    inode: usize,
}

impl Archive {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// A file in [`DIR`].
    fn file(&mut self, name: &str, contents: &[u8]) {
        self.entry(&format!("{DIR}/{name}"), 0o100_755, contents);
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.inode += 1;
        let (inode, size, name_len) = (self.inode, contents.len(), name.len() + 1);
        // Magic, inode, mode, user, group, links, time, size, four device numbers, name, checksum.
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}\
             {0:08x}{0:08x}{0:08x}{0:08x}{name_len:08x}{0:08x}",
            0, 1
        );
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_one() {
        let mut archive = Archive::default();
        archive.directory("d");
        archive.file("x", b"hello");
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(4));
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 3);
        // The header is 110 bytes long; name and contents are padded to four.
        assert_eq!(&bytes[110..112], b"d\0");
        let second = 112 + 110;
        assert_eq!(&bytes[second..second + 8], b"bench/x\0");
        assert_eq!(&bytes[second + 10..second + 15], b"hello");
    }

    #[test]
    fn this_program_has_a_loader_and_libraries() {
        let program = read(&std::env::current_exe().unwrap()).unwrap();
        let parts = Parts::of(&program).unwrap();
        assert!(parts.end <= program.len());
        assert!(Path::new(parts.interpreter.as_ref().unwrap()).exists());
        assert!(
            libraries()
                .unwrap()
                .iter()
                .any(|path| path.to_string_lossy().contains("libc"))
        );
        assert!(Parts::of(b"#!/bin/sh").is_err());
        assert!(Parts::of(&program[..100]).is_err());
        // Cut down, it still runs.
        let path = std::env::temp_dir().join(format!("lanlet-loaded-{}", std::process::id()));
        fs::write(&path, loaded(&program, parts.end)).unwrap();
        let mut command = std::process::Command::new(parts.interpreter.unwrap());
        let output = command.arg(&path).arg("--list").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        fs::remove_file(&path).unwrap();
    }
}
