//! A MAC that stays: made from what a VM is called, or else from its disk, so that a reboot keeps its address.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::frame::Mac;
use crate::names::GuestName;

/// QEMU's options without a value: what follows one of them may be a disk image.
const FLAGS: [&str; 14] = [
    "-enable-kvm",
    "-nographic",
    "-snapshot",
    "-no-reboot",
    "-no-shutdown",
    "-nodefaults",
    "-no-user-config",
    "-no-acpi",
    "-no-hpet",
    "-no-fd-bootchk",
    "-full-screen",
    "-daemonize",
    "-s",
    "-S",
];

/// The MAC of the guest of this name or else with this disk; `None`: it has neither.
pub(super) fn mac(name: Option<&GuestName>, arguments: &[OsString]) -> Option<Mac> {
    match name {
        Some(name) => Some(made_from("name", name.as_str().as_bytes())),
        // By its path: an image that is written anew is the same guest's.
        None => {
            let disk = disk(arguments)?.canonicalize().ok()?;
            Some(made_from("disk", disk.as_os_str().as_bytes()))
        }
    }
}

/// In QEMU's range 52:54:00. FNV-1a, because std's hashers may change between releases.
fn made_from(kind: &str, bytes: &[u8]) -> Mac {
    let text = kind.bytes().chain([b'/']).chain(bytes.iter().copied());
    let hash = text.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // FNV's low bits hardly depend on the first bytes.
    let [.., a, b, c] = (hash ^ hash >> 32).to_be_bytes();
    Mac([0x52, 0x54, 0, a, b, c])
}

/// The first disk that QEMU is given: by -drive, -hda or -blockdev, or as an argument of its own.
fn disk(arguments: &[OsString]) -> Option<PathBuf> {
    let value = |at: usize| arguments.get(at + 1).map(OsString::as_os_str);
    arguments.iter().enumerate().find_map(|(at, argument)| {
        let text = argument.to_str()?;
        let option = text.strip_prefix("--").map_or(text, |_| &text[1..]);
        match option {
            "-hda" => value(at).map(PathBuf::from),
            "-drive" => item(value(at)?, "file="),
            "-blockdev" => item(value(at)?, "filename="),
            _ => {
                let before = at
                    .checked_sub(1)
                    .and_then(|before| arguments[before].to_str());
                let is_value = before
                    .is_some_and(|before| before.starts_with('-') && !FLAGS.contains(&before));
                let is_disk = !is_value && !text.starts_with('-');
                is_disk
                    .then(|| PathBuf::from(argument))
                    .filter(|path| Path::is_file(path))
            }
        }
    })
}

/// The value of a key in a list like `if=virtio,file=disk.img`, where a comma in a value is written twice.
fn item(list: &OsStr, key: &str) -> Option<PathBuf> {
    let list = list.to_str()?.replace(",,", "\0");
    let value = list.split(',').find_map(|item| {
        // file.filename=, of a -blockdev.
        let item = item.strip_prefix("file.").unwrap_or(item);
        item.strip_prefix(key)
    })?;
    Some(PathBuf::from(value.replace('\0', ",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_first_disk_is_found() {
        let image = std::env::temp_dir().join(format!("lanlet-disk-{}", std::process::id()));
        std::fs::write(&image, "").unwrap();
        let path = image.to_str().unwrap();
        for line in [
            "-m 1G -drive if=virtio,file=PATH,format=raw -hda other.img",
            "-hda PATH",
            "--hda PATH",
            "-blockdev driver=file,node-name=d,filename=PATH",
            "-blockdev qcow2,node-name=d,file.driver=file,file.filename=PATH",
            "-m 1G PATH",
            "-enable-kvm PATH",
            "PATH",
        ] {
            let found = disk(&words(&line.replace("PATH", path)));
            assert_eq!(found.as_deref(), Some(image.as_path()), "{line}");
        }
        for line in [
            "-m 1G",
            "-kernel PATH",
            "-enable-kvm /no/such.img",
            "-cdrom PATH",
        ] {
            assert_eq!(disk(&words(&line.replace("PATH", path))), None, "{line}");
        }
        let comma = item(OsStr::new("file=a,,b.img,if=virtio"), "file=");
        assert_eq!(comma, Some(PathBuf::from("a,b.img")));
        std::fs::remove_file(&image).unwrap();
    }

    #[test]
    fn a_mac_follows_from_the_name_before_the_disk() {
        let name: GuestName = "web".parse().unwrap();
        let of_name = mac(Some(&name), &[]).unwrap();
        // What running guests have: it may not change from release to release.
        assert_eq!(of_name.to_string(), "52:54:00:e8:30:40");
        assert_eq!(
            mac(Some(&name), &words("-hda /etc/hostname")),
            Some(of_name)
        );
        let of_disk = mac(None, &words("-hda /etc/passwd")).unwrap();
        assert_ne!(of_disk, of_name);
        assert_eq!(mac(None, &words("-hda /etc/../etc/passwd")), Some(of_disk));
        assert_eq!(mac(None, &words("-hda /no/such")), None);
        assert_eq!(mac(None, &[]), None);
    }
}
