//! Which networks run, and the names of private ones.

use std::path::Path;

use rustix::fs::FlockOperation;

use super::{Claim, ControlError, RuntimeDir, is_at};

/// Most names looked at: each costs an open file for a moment.
const NAMES_MAX: usize = 4096;
/// The words that the names of private networks begin with: the commands that have one.
const PRIVATE: [&str; 4] = ["exec", "run", "qemu", "check"];
/// Names that a private network tries: processes of several pid namespaces may have one number, and share
/// the directory.
const PRIVATE_TRIES: u32 = 16;

/// A network that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Running {
    /// Its name.
    pub name: String,
    /// Who runs it, if the lock file says.
    pub pid: Option<u32>,
}

impl RuntimeDir {
    /// The networks whose names are held, in the order of their names.
    ///
    /// # Errors
    /// The directory can't be trusted or read.
    pub fn running(&self) -> Result<Vec<Running>, ControlError> {
        let mut running: Vec<_> = self
            .names()?
            .into_iter()
            .filter_map(|name| {
                let pid = self.holder(&name)?;
                Some(Running { name, pid })
            })
            .collect();
        running.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(running)
    }

    /// Claims a name for the private network of a command, called `kind`: `exec-1234`.
    ///
    /// # Errors
    /// The directory can't be used.
    pub fn claim_private(&self, kind: &str) -> Result<(String, Claim), ControlError> {
        self.sweep();
        let own = format!("{kind}-{}", std::process::id());
        let mut tries = 1..PRIVATE_TRIES;
        let mut name = own.clone();
        loop {
            match self.claim(&name) {
                Ok(mut claim) => {
                    claim.is_private = true;
                    return Ok((name, claim));
                }
                Err(busy @ ControlError::Busy { .. }) => match tries.next() {
                    Some(number) => name = format!("{own}-{number}"),
                    None => return Err(busy),
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes what private networks left behind whose processes were killed.
    pub fn sweep(&self) {
        let names = self.names().unwrap_or_default();
        for name in names.iter().filter(|name| may_be_left(name)) {
            self.remove_left(name);
        }
    }

    fn remove_left(&self, name: &str) {
        let path = self.lock(name);
        let Ok(lock) = std::fs::File::open(&path) else {
            return;
        };
        // Whoever claims the name waits for this lock, and looks then whether the file is still there.
        let locked = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
        if locked.is_ok() && is_at(&lock, &path) {
            let _ = std::fs::remove_file(path.with_extension("sock"));
            let _ = std::fs::remove_file(path);
        }
    }

    /// The names that have a lock file, held or not.
    fn names(&self) -> Result<Vec<String>, ControlError> {
        if !self.exists_safely()? {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(&self.path).map_err(|error| ControlError::Io {
            action: "read",
            path: self.path.clone(),
            error,
        })?;
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            let file = entry.ok()?.file_name();
            let name = file.to_str()?.strip_suffix(".lock")?;
            crate::config::check_name(name).ok()?;
            Some(name.to_owned())
        };
        Ok(entries.filter_map(name).take(NAMES_MAX).collect())
    }
}

/// Whether the name is one of a private network.
pub fn is_private(name: &str) -> bool {
    private_pid(name).is_some()
}

/// The process that a private network's name tells of.
fn private_pid(name: &str) -> Option<u32> {
    let (kind, rest) = name.split_once('-')?;
    let (pid, number) = rest.split_once('-').unwrap_or((rest, "1"));
    number.parse::<u32>().ok()?;
    PRIVATE.contains(&kind).then(|| pid.parse().ok())?
}

/// Whether the name is one of a private network, and of a process that this one does not see. Of one that
/// it does the lock decides, too, but it is asked for less often.
fn may_be_left(name: &str) -> bool {
    private_pid(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::super::tests::Scratch;
    use super::*;

    fn files(dir: &RuntimeDir) -> Vec<String> {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let mut files: Vec<_> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        files.sort();
        files
    }

    #[test]
    fn private_names_are_their_processes_and_leave_nothing() {
        let scratch = Scratch::new("private");
        let dir = RuntimeDir::at(&scratch.0);
        let pid = std::process::id();
        let (name, claim) = dir.claim_private("exec").unwrap();
        assert_eq!(name, format!("exec-{pid}"));
        // A process of another pid namespace may have the same number.
        let (second, other) = dir.claim_private("exec").unwrap();
        assert_eq!(second, format!("exec-{pid}-1"));
        let lab = dir.claim("lab").unwrap();
        let running = dir.running().unwrap();
        let names: Vec<_> = running.iter().map(|network| &*network.name).collect();
        assert_eq!(names, [&*name, &*second, "lab"]);
        assert!(running.iter().all(|network| network.pid == Some(pid)));
        drop((claim, other, lab));
        assert_eq!(files(&dir), ["lab.lock"]);
        assert_eq!(dir.running().unwrap(), []);
    }

    #[test]
    fn what_a_killed_process_left_is_swept_and_nothing_else() {
        let scratch = Scratch::new("sweep");
        let dir = RuntimeDir::at(&scratch.0);
        // Above the greatest process number there can be (PID_MAX_LIMIT).
        let gone = 1 << 23;
        let live = dir.claim(&format!("qemu-{gone}")).unwrap();
        for name in [&*format!("exec-{gone}"), "exec-x", "exec-1-x", "lab", "."] {
            for ending in ["lock", "sock"] {
                std::fs::write(scratch.0.join(format!("{name}.{ending}")), "").unwrap();
            }
        }
        let before = files(&dir);
        assert_eq!(before.len(), 12);
        dir.sweep();
        let left = |file: &&String| !file.starts_with(&format!("exec-{gone}"));
        let expected: Vec<_> = before.iter().filter(left).cloned().collect();
        assert_eq!(files(&dir), expected);
        drop(live);
        // Locked under a name whose file was swept away meanwhile: the claim is of the new file.
        let name = format!("run-{gone}");
        let claims: Vec<_> = (0..4)
            .map(|_| {
                let (dir, name) = (dir.clone(), name.clone());
                std::thread::spawn(move || {
                    for _ in 0..200 {
                        dir.sweep();
                        if let Ok(claim) = dir.claim(&name) {
                            assert!(dir.is_claimed(&name));
                            claim.forget();
                        }
                    }
                })
            })
            .collect();
        for thread in claims {
            thread.join().unwrap();
        }
    }
}
