//! Ports that a network has from its start: `KIND:WHERE[,name=NAME][,group=NAME]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::nat::policy::parse::check_guest_name;

/// A port to begin with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSpec {
    /// What it is, and where.
    pub kind: PortKind,
    /// Name shown by `status` and said in rules.
    pub name: Option<String>,
    /// Group of the guests behind it.
    pub group: Option<String>,
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
        for (key, value) in [("name", &self.name), ("group", &self.group)] {
            if let Some(value) = value {
                write!(f, ",{key}={value}")?;
            }
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
        };
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let field = match key {
                "name" => &mut spec.name,
                "group" => &mut spec.group,
                _ => {
                    return Err(format!(
                        "{part:?} is neither name=NAME nor group=NAME (a path with a comma can't be said)"
                    ));
                }
            };
            check_guest_name(value).map_err(|reason| format!("{key}: {reason}"))?;
            *field = Some(value.to_owned());
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
        ] {
            assert!(bad.parse::<PortSpec>().is_err(), "{bad}");
        }
    }
}
