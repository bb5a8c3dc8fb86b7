//! Ports that a network has from its start: `KIND:WHERE[,name=NAME][,group=NAME][,allow-guests]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::names::{GroupName, GuestName, NameError};

/// A port to begin with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSpec {
    /// What it is, and where.
    pub kind: PortKind,
    /// Name shown by `status` and said in rules.
    pub name: Option<GuestName>,
    /// Group of the guests behind it.
    pub group: Option<GroupName>,
    /// Who connects may be a guest of `lanlet exec`, who has its user's files.
    pub allow_guests: bool,
}

/// What a port is, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PortKind {
    /// A vhost-user socket that front-ends connect to.
    VhostUser(PathBuf),
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PortKind::VhostUser(path) = &self.kind;
        write!(f, "vhost-user:{}", path.display())?;
        if let Some(name) = &self.name {
            write!(f, ",name={name}")?;
        }
        if let Some(group) = &self.group {
            write!(f, ",group={group}")?;
        }
        if self.allow_guests {
            f.write_str(",allow-guests")?;
        }
        Ok(())
    }
}

impl FromStr for PortSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        if kind != "vhost-user" {
            return Err(format!(
                "{kind:?} is no kind of port: vhost-user:PATH is one"
            ));
        }
        let mut parts = rest.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() || path.ends_with('/') {
            return Err(format!("{path:?} is not the path of a socket"));
        }
        let path = std::path::absolute(path).map_err(|error| format!("{path:?}: {error}"))?;
        let mut spec = Self {
            kind: PortKind::VhostUser(path),
            name: None,
            group: None,
            allow_guests: false,
        };
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let wrong = |error: NameError| format!("{key}: {error}");
            match key {
                "name" => spec.name = Some(value.parse().map_err(wrong)?),
                "group" => spec.group = Some(value.parse().map_err(wrong)?),
                "allow-guests" if value.is_empty() => spec.allow_guests = true,
                _ => {
                    return Err(format!(
                        "{part:?} is not name=NAME, group=NAME or allow-guests (a path with a comma can't be \
                         said)"
                    ));
                }
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_in_words() {
        for text in [
            "vhost-user:/run/a.sock",
            "vhost-user:/run/a.sock,name=web,group=dmz",
            "vhost-user:/run/a.sock,group=1,allow-guests",
        ] {
            let spec: PortSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), text);
        }
        let relative: PortSpec = "vhost-user:a.sock".parse().unwrap();
        let PortKind::VhostUser(path) = relative.kind;
        assert!(path.is_absolute() && path.ends_with("a.sock"));
        for bad in [
            "",
            "tap:/x",
            "vhost-user",
            "vhost-user:",
            "vhost-user:/run/",
            "vhost-user:/x,nam=y",
            "vhost-user:/x,name=",
            "vhost-user:/x,name=a b",
            "vhost-user:/x,name=Web_1!",
        ] {
            assert!(bad.parse::<PortSpec>().is_err(), "{bad}");
        }
    }
}
