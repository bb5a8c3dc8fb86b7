//! Files of configuration, read without ever waiting for anybody.
//!
//! A path that is meant to be a file may be a FIFO, a terminal or a device: to open one of these can
//! block for ever, or set something off, and to read one may never end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading; links are followed.
///
/// # Errors
/// Of stat and open; `InvalidInput` for anything that is no regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let regular = |meta: fs::Metadata| match meta.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )),
    };
    // Before the open, since a device's driver acts on one; and after it, since the path may have
    // changed in between, when O_NONBLOCK has kept a FIFO from blocking.
    regular(fs::metadata(path)?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    regular(file.metadata()?)?;
    Ok(file)
}

/// The first `len_max` bytes of a regular file.
///
/// # Errors
/// As of [`open`], and of read.
pub fn read(path: &Path, len_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(len_max as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// As [`read`], as text: what is no UTF-8 is replaced.
///
/// # Errors
/// As of [`read`].
pub fn read_text(path: &Path, len_max: usize) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&read(path, len_max)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read_and_only_so_far() {
        let directory = std::env::temp_dir().join(format!("lanlet-small-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let (file, fifo) = (directory.join("file"), directory.join("fifo"));
        fs::write(&file, "0123456789").unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let link = directory.join("link");
        std::os::unix::fs::symlink("fifo", &link).unwrap();
        assert_eq!(read(&file, 4).unwrap(), b"0123");
        assert_eq!(read_text(&file, 100).unwrap(), "0123456789");
        for special in [&fifo, &link, &directory, Path::new("/dev/zero")] {
            let error = read(special, 100).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{special:?}");
        }
        let missing = read(&directory.join("none"), 1).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        fs::remove_dir_all(directory).unwrap();
    }
}
