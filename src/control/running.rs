//! Which networks run.

use super::{ControlError, RuntimeDir};

/// Most names looked at: each costs an open file for a moment.
const NAMES_MAX: usize = 4096;

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

    /// The names that have a lock file, held or not.
    pub(super) fn names(&self) -> Result<Vec<String>, ControlError> {
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
