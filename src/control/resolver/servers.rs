//! Which resolvers are asked: those configured, else the host's own from /etc/resolv.conf.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::ResolverConfig;

/// Servers that are used; glibc uses three.
const SERVERS_MAX: usize = 8;
/// How often the file's modification time is looked at.
const RECHECK: Duration = Duration::from_secs(1);
/// Larger is no resolv.conf.
const RESOLV_CONF_LEN_MAX: usize = 64 * 1024;

/// The servers known.
pub(super) struct Servers {
    config: ResolverConfig,
    known: Vec<SocketAddr>,
    /// The one that answered last.
    pub(super) last_good: Option<SocketAddr>,
    /// The host wants all queries over TCP (`options use-vc`).
    tcp_only: bool,
    checked_at: Option<Instant>,
    modified: Option<SystemTime>,
}

impl Servers {
    /// None is known before the file is read, unless they are configured.
    pub(super) fn new(config: ResolverConfig) -> Self {
        let known = config
            .servers
            .iter()
            .map(|&server| (server, config.port).into());
        Self {
            known: known.take(SERVERS_MAX).collect(),
            config,
            last_good: None,
            tcp_only: false,
            checked_at: None,
            modified: None,
        }
    }

    /// All servers, the one that answered last first.
    pub(super) fn in_order(&mut self, now: Instant) -> Vec<SocketAddr> {
        if self.config.servers.is_empty() {
            self.refresh(now);
        }
        let mut order = self.known.clone();
        if let Some(good) = self.last_good
            && let Some(at) = order.iter().position(|&server| server == good)
        {
            order[..=at].rotate_right(1);
        }
        order
    }

    /// Whether queries go over TCP at once.
    pub(super) fn tcp_only(&self) -> bool {
        self.tcp_only
    }

    fn refresh(&mut self, now: Instant) {
        if self
            .checked_at
            .is_some_and(|at| now.duration_since(at) < RECHECK)
        {
            return;
        }
        self.checked_at = Some(now);
        let path = &self.config.resolv_conf;
        let modified = std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok();
        if modified == self.modified && modified.is_some() {
            return;
        }
        self.modified = modified;
        // A file that is just being replaced is missing for a moment: the servers stay.
        if let Ok(text) = read_resolv_conf(path) {
            self.known = parse_resolv_conf(&text, self.config.port);
            self.tcp_only = wants_tcp(&text);
            log::debug!("DNS servers: {:?}", self.known);
        }
    }
}

fn read_resolv_conf(path: &Path) -> io::Result<String> {
    let bytes = std::fs::read(path)?;
    let bytes = &bytes[..bytes.len().min(RESOLV_CONF_LEN_MAX)];
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// The `nameserver` lines (resolv.conf(5)).
fn parse_resolv_conf(text: &str, port: u16) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(nameserver)
        .filter_map(|word| parse_server(word, port))
        .take(SERVERS_MAX)
        .collect()
}

/// Whether `options use-vc` stands there (resolv.conf(5)).
fn wants_tcp(text: &str) -> bool {
    text.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some("options") && words.any(|word| word == "use-vc")
    })
}

fn nameserver(line: &str) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    words.next().filter(|&key| key == "nameserver")?;
    words.next()
}

/// An address; a link-local IPv6 one has its interface behind `%`, by number or name.
fn parse_server(word: &str, port: u16) -> Option<SocketAddr> {
    let Some((address, zone)) = word.split_once('%') else {
        return Some((word.parse::<IpAddr>().ok()?, port).into());
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = zone.parse().ok().or_else(|| interface_index(zone))?;
    Some(SocketAddrV6::new(address, port, 0, scope).into())
}

fn interface_index(name: &str) -> Option<u32> {
    if name.contains('/') {
        return None;
    }
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_changes_of_resolv_conf() {
        let path = std::env::temp_dir().join(format!("lanlet-resolv-{}.conf", std::process::id()));
        let write = |text: &str, at: u64| {
            std::fs::write(&path, text).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(at))
                .unwrap();
        };
        let mut servers = Servers::new(ResolverConfig {
            resolv_conf: path.clone(),
            ..ResolverConfig::default()
        });
        let start = Instant::now();
        assert_eq!(servers.in_order(start), []);
        write("nameserver 10.0.0.1\nnameserver 10.0.0.2\n", 1_000);
        assert_eq!(servers.in_order(start), [], "looked at once a second");
        let order = |servers: &mut Servers, secs: u64| -> Vec<IpAddr> {
            let now = start + Duration::from_secs(secs);
            servers.in_order(now).iter().map(SocketAddr::ip).collect()
        };
        let address = |last| IpAddr::from([10, 0, 0, last]);
        assert_eq!(order(&mut servers, 2), [address(1), address(2)]);
        servers.last_good = Some((address(2), 53).into());
        assert_eq!(order(&mut servers, 4), [address(2), address(1)]);
        write("nameserver 10.0.0.3\n", 2_000);
        assert_eq!(order(&mut servers, 6), [address(3)]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(order(&mut servers, 8), [address(3)], "being replaced");
    }

    #[test]
    fn reads_resolv_conf_as_the_manual_says() {
        let text = "# nameserver 1.1.1.1\nsearch example.com\n  nameserver\t10.0.0.1 # first\n\
            nameserver fd00::1\nnameserver fe80::1%7\nnameserver fe80::2%lo\nnameserver fe80::3%no/pe\n\
            nameserver nonsense\nnameserver\nnameservers 10.0.0.9\nnameserver 10.0.0.2";
        let servers: Vec<_> = parse_resolv_conf(text, 53)
            .iter()
            .map(SocketAddr::to_string)
            .collect();
        assert_eq!(
            servers,
            [
                "10.0.0.1:53",
                "[fd00::1]:53",
                "[fe80::1%7]:53",
                "[fe80::2%1]:53",
                "10.0.0.2:53"
            ]
        );
        let many = "nameserver 10.0.0.1\n".repeat(100);
        assert_eq!(parse_resolv_conf(&many, 53).len(), SERVERS_MAX);
    }
}
