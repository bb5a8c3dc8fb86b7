//! A guest's own /etc: the host's, but for `resolv.conf` and `hosts`.
//!
//! A mount over the host's `resolv.conf` would go the moment that the host renames another file to
//! that name, as systemd-resolved, NetworkManager and dhclient do (`detach_mounts` in fs/namespace.c),
//! and there is none where the file is missing or a link to nowhere. So /etc is a tmpfs: directories
//! of the host's /etc are bind mounts in it, its links are copied, and its files are links into the
//! whole of it, which is at `/etc/.host`. A file that the host replaces is followed that way. What
//! comes to the host's /etc later is at `/etc/.host` only.
//!
//! Services of the host that look names up for any process through a unix socket would answer past
//! the network's DNS and policy: their directories are covered.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_bind_recursive, mount_remount, move_mount, open_tree, unmount,
};

use crate::sys::small_file;
use crate::tap::TapError;

const ETC: &str = "/etc";
/// The host's /etc in the guest's.
const HOST: &str = ".host";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";
/// Of the tmpfs: links, the two files, and what a DHCP client or the like writes there.
const ETC_OPTIONS: &std::ffi::CStr = c"mode=0755,size=16m";
/// A longer `hosts` of the host's, as some block advertisements with, is linked to and not copied.
const HOSTS_LEN_MAX: usize = 1024 * 1024;
/// Where glibc's NSS modules find the host's resolvers: nss-resolve, nscd (its clients use the second
/// path), nss-mdns.
const RESOLVER_SOCKETS: [&str; 4] = [
    "/run/systemd/resolve",
    "/run/nscd",
    "/var/run/nscd",
    "/run/avahi-daemon",
];

/// Files of a guest that tell of its network.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct GuestFiles {
    /// Contents of `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// Lines of `/etc/hosts` that go before the host's.
    pub hosts: String,
}

impl GuestFiles {
    /// Puts them into an /etc of the calling process's mount namespace.
    ///
    /// # Errors
    /// What is not as it should be and what follows from it: worth a warning.
    pub(super) fn set(&self) -> Result<(), TapError> {
        // Where the host's file is; usually in one of the directories that are covered.
        let host_file = fs::canonicalize(RESOLV_CONF);
        let covered = cover_resolver_sockets();
        match self.make_etc() {
            Ok(()) => covered,
            Err(error) => {
                let cause = |effect| TapError::GuestFile {
                    path: ETC.to_owned(),
                    cause: format!(
                        "the guest can't have its own ({error}; a security module or a container's \
                         profile may forbid mounts in namespaces), {effect}"
                    ),
                };
                let host_file = host_file.and_then(|path| self.mount_resolv_conf(&path));
                Err(match host_file {
                    Ok(()) => cause(
                        "so that names resolve only until the host replaces its resolv.conf"
                            .to_owned(),
                    ),
                    Err(error) => cause(format!(
                        "and {RESOLV_CONF} can't be mounted over ({error}): names will not resolve \
                         in the guest"
                    )),
                })
            }
        }
    }

    fn make_etc(&self) -> io::Result<()> {
        // Who can write to the host's /etc would lose what is written to this one with the guest: then
        // nothing can be made in it.
        let read_only = accessat(CWD, ETC, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let host = open_tree(CWD, ETC, flags)?;
        let mounted = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", ETC, "tmpfs", mounted, ETC_OPTIONS)?;
        let fill = || {
            let whole = Path::new(ETC).join(HOST);
            fs::create_dir(&whole)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&host, "", CWD, &whole, flags)?;
            for entry in fs::read_dir(&whole)? {
                add(&entry?)?;
            }
            self.write()?;
            if read_only {
                mount_remount(ETC, mounted | MountFlags::BIND | MountFlags::RDONLY, "")?;
            }
            Ok(())
        };
        let filled = fill();
        if filled.is_err() {
            // The host's is there again.
            let _ = unmount(ETC, UnmountFlags::DETACH);
        }
        filled
    }

    fn write(&self) -> io::Result<()> {
        write(Path::new(RESOLV_CONF), &self.resolv_conf)?;
        let host = Path::new(ETC).join(HOST).join("hosts");
        match small_file::read_text(&host, HOSTS_LEN_MAX + 1) {
            Ok(text) if text.len() > HOSTS_LEN_MAX => symlink(Path::new(HOST).join("hosts"), HOSTS),
            Ok(text) => write(Path::new(HOSTS), &format!("{}{text}", self.hosts)),
            Err(_) => {
                let localhost = "127.0.0.1 localhost\n::1 localhost\n";
                write(Path::new(HOSTS), &format!("{}{localhost}", self.hosts))
            }
        }
    }

    /// Puts the resolver's file where the host's is, `target`: a mount must be on the file itself, and the link
    /// usually points into /run.
    fn mount_resolv_conf(&self, target: &Path) -> io::Result<()> {
        if !target.exists() {
            // Its directory is covered, by a tmpfs of this guest's own.
            return write(target, &self.resolv_conf);
        }
        let source = self.write_temporary()?;
        let mounted = mount_bind(&source, target);
        // The mount keeps the contents.
        let _ = fs::remove_file(&source);
        Ok(mounted?)
    }

    fn write_temporary(&self) -> io::Result<PathBuf> {
        let name = format!("lanlet-resolv.{}.conf", std::process::id());
        let directories = [
            std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
            Some(std::env::temp_dir()),
        ];
        let mut failure = io::Error::from(io::ErrorKind::NotFound);
        for path in directories
            .into_iter()
            .flatten()
            .map(|directory| directory.join(&name))
        {
            // Left over by a process of the same id, ours if it can be removed at all.
            let _ = fs::remove_file(&path);
            match write(&path, &self.resolv_conf) {
                Ok(()) => return Ok(path),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

/// Adds to the guest's /etc what the host's has under that name.
fn add(entry: &fs::DirEntry) -> io::Result<()> {
    let name = entry.file_name();
    let target = Path::new(ETC).join(&name);
    // Its own; the last is there where the host is itself such a guest.
    if ["resolv.conf", "hosts", HOST]
        .iter()
        .any(|&own| name == own)
    {
        return Ok(());
    }
    let kind = entry.file_type()?;
    if kind.is_dir() {
        // A mount, since links of a directory may go up by "..", which a link to it would lead astray.
        fs::create_dir(&target)?;
        return Ok(mount_bind_recursive(entry.path(), &target)?);
    }
    match kind.is_symlink() {
        true => symlink(fs::read_link(entry.path())?, target),
        false => symlink(Path::new(HOST).join(name), target),
    }
}

/// Writes a fresh file that anybody may read.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)?;
    // Whatever the umask: a command that gives its rights up reads it too.
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())
}

fn cover_resolver_sockets() -> Result<(), TapError> {
    let mut covered: Vec<PathBuf> = Vec::new();
    for path in RESOLVER_SOCKETS {
        let Ok(directory) = fs::canonicalize(path) else {
            continue;
        };
        if covered.contains(&directory) || !directory.is_dir() {
            continue;
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("tmpfs", &directory, "tmpfs", flags, c"mode=0755").map_err(|error| {
            TapError::GuestFile {
                path: path.to_owned(),
                cause: format!(
                    "{error}; names may resolve by the host's service there, past the network's DNS \
                     and policy"
                ),
            }
        })?;
        covered.push(directory);
    }
    Ok(())
}
