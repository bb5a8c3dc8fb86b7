//! The lease file: the lease table across restarts, as JSON a person can read.
//!
//! Replaced as a whole by rename, so that a crash leaves the old file or the new one, never half of
//! one. It is a memory, not a database: a missing or broken file costs guests their remembered
//! addresses and nothing else, so reading never fails a start.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Subnet;
use crate::dhcp::lease::{LEASES_MAX, LeaseRecord};
use crate::sys::small_file;

/// Grows when old files can't be read any more.
const VERSION: u32 = 1;
/// Largest file that is read: [`LEASES_MAX`] leases with the longest identifier and name.
const FILE_LEN_MAX: u64 = 4 << 20;
const _: () = assert!(LEASES_MAX as u64 * 1024 <= FILE_LEN_MAX);
/// Guests' names and addresses are their owner's business.
const FILE_MODE: u32 = 0o600;

#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    /// Of the network that wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet: Option<String>,
    leases: Vec<LeaseRecord>,
}

/// Where a network keeps its leases.
#[derive(Clone, Debug)]
pub struct LeaseFile {
    path: PathBuf,
}

impl LeaseFile {
    /// A file at `path`; its directory has to exist when it is saved.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The leases of the last run; none if there is no file.
    ///
    /// # Errors
    /// The file can't be read or is not a lease file. The caller warns and starts without it.
    pub fn load(&self) -> io::Result<Vec<LeaseRecord>> {
        Ok(self.contents()?.leases)
    }

    /// The subnet of the last run, where that is known.
    pub fn subnet(&self) -> Option<Subnet> {
        self.contents().ok()?.subnet?.parse().ok()
    }

    fn contents(&self) -> io::Result<Contents> {
        let file = match small_file::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Contents {
                    version: VERSION,
                    subnet: None,
                    leases: Vec::new(),
                });
            }
            Err(error) => return Err(error),
        };
        let mut text = String::new();
        if file.take(FILE_LEN_MAX + 1).read_to_string(&mut text)? as u64 > FILE_LEN_MAX {
            return Err(invalid(format!("larger than {FILE_LEN_MAX} bytes")));
        }
        let contents: Contents = serde_json::from_str(&text).map_err(io::Error::from)?;
        if contents.version != VERSION {
            let version = contents.version;
            return Err(invalid(format!(
                "version {version}, this lanlet reads {VERSION}"
            )));
        }
        Ok(contents)
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// The directory is missing, not writable or full.
    pub fn save(&self, subnet: Subnet, leases: Vec<LeaseRecord>) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(&Contents {
            version: VERSION,
            subnet: Some(subnet.to_string()),
            leases,
        })?;
        text.push(b'\n');
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let beside = PathBuf::from(name);
        // A leftover of a crash, or a link someone planted: not to be written through.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(&beside)?;
        file.write_all(&text)?;
        file.sync_data()?;
        fs::rename(&beside, &self.path)
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::subnet4::SUBNET_DEFAULT;
    use std::os::unix::fs::MetadataExt;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("lanlet-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn record(last: u8) -> LeaseRecord {
        LeaseRecord {
            address: [192, 168, 122, last].into(),
            mac: "52:54:00:00:00:07".to_owned(),
            client_id: (last == 5).then(|| "ff00aa".to_owned()),
            hostname: (last == 5).then(|| "web".to_owned()),
            expires_unix: 1_900_000_000,
            lease_secs: 3600,
        }
    }

    #[test]
    fn round_trip_and_replacement() {
        let directory = Directory::new("round-trip");
        let file = LeaseFile::new(directory.0.join("leases.json"));
        assert_eq!(file.load().unwrap(), []);
        assert_eq!(file.subnet(), None);
        file.save(SUBNET_DEFAULT, vec![record(5), record(6)])
            .unwrap();
        assert_eq!(file.load().unwrap(), [record(5), record(6)]);
        assert_eq!(file.subnet(), Some(SUBNET_DEFAULT));
        // A crash between writing and renaming leaves this behind.
        fs::write(directory.0.join("leases.json.new"), "{").unwrap();
        file.save(SUBNET_DEFAULT, vec![record(6)]).unwrap();
        assert_eq!(file.load().unwrap(), [record(6)]);
        assert_eq!(fs::metadata(file.path()).unwrap().mode() & 0o777, FILE_MODE);
        assert_eq!(fs::read_dir(&directory.0).unwrap().count(), 1);
    }

    #[test]
    fn does_not_write_through_a_planted_link() {
        let directory = Directory::new("planted");
        let victim = directory.0.join("victim");
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, directory.0.join("leases.json.new")).unwrap();
        let file = LeaseFile::new(directory.0.join("leases.json"));
        file.save(SUBNET_DEFAULT, vec![record(5)]).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(file.load().unwrap(), [record(5)]);
    }

    #[test]
    fn broken_files_are_errors_not_panics() {
        let directory = Directory::new("broken");
        let file = LeaseFile::new(directory.0.join("leases.json"));
        for text in [
            "",
            "{",
            "[]",
            "{\"version\":1}",
            "{\"version\":9,\"leases\":[]}",
            "\u{0}",
        ] {
            fs::write(file.path(), text).unwrap();
            assert!(file.load().is_err(), "{text:?}");
        }
        fs::write(file.path(), vec![b' '; FILE_LEN_MAX as usize + 1]).unwrap();
        assert!(file.load().is_err());
        assert!(
            LeaseFile::new(directory.0.join("no/such/leases.json"))
                .save(SUBNET_DEFAULT, vec![])
                .is_err()
        );
    }
}
