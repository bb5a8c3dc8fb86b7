//! Which resolvers are asked: those configured, else the host's own from /etc/resolv.conf.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use super::ResolverConfig;
use crate::sys::small_file;

/// Servers that are used; glibc uses three.
const SERVERS_MAX: usize = 8;
/// How often the file's modification time is looked at.
const RECHECK: Duration = Duration::from_secs(1);
/// How long queries wait for a look at the file: a disk that sleeps is up in seconds, but a guest asks again
/// before. Once for each time that it is slow.
const LOOK_TIME_MAX: Duration = Duration::from_millis(500);
/// What is beyond is no resolv.conf.
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
    /// A look at the file that takes long.
    under_way: Option<Receiver<Look>>,
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
            under_way: None,
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
        let look = match self.under_way.take() {
            // The wait was long enough the first time.
            Some(under_way) => match under_way.try_recv() {
                Err(TryRecvError::Empty) => {
                    self.under_way = Some(under_way);
                    return;
                }
                look => look.ok(),
            },
            None => {
                let look = begin_look(self.config.resolv_conf.clone(), self.modified);
                match look.recv_timeout(LOOK_TIME_MAX) {
                    Err(RecvTimeoutError::Timeout) => {
                        self.under_way = Some(look);
                        return;
                    }
                    look => look.ok(),
                }
            }
        };
        let Some(look) = look else {
            return;
        };
        self.modified = look.modified;
        // A file that is just being replaced is missing for a moment: the servers stay.
        if let Some(text) = look.text {
            self.known = parse_resolv_conf(&text, self.config.port);
            self.tcp_only = wants_tcp(&text);
            log::debug!("DNS servers: {:?}", self.known);
        }
    }
}

/// What a look at the file found.
struct Look {
    modified: Option<SystemTime>,
    /// Its contents, where they may have changed.
    text: Option<String>,
}

/// Looks at the file by a thread of its own, of which there is one at a time: a file system that does not
/// answer must not hold up queries.
fn begin_look(path: PathBuf, known: Option<SystemTime>) -> Receiver<Look> {
    let (found, look) = sync_channel(1);
    let looking = move || {
        let metadata = std::fs::metadata(&path);
        let modified = metadata.and_then(|metadata| metadata.modified()).ok();
        let text = match modified == known && modified.is_some() {
            true => None,
            false => small_file::read_text(&path, RESOLV_CONF_LEN_MAX).ok(),
        };
        // Nobody waits any more: the network has ended.
        let _ = found.send(Look { modified, text });
    };
    // Without a thread the receiver hears at once that nothing comes.
    let named = std::thread::Builder::new().name("lanlet-resolv".to_owned());
    if let Err(error) = named.spawn(looking) {
        log::debug!("resolv.conf is not looked at: {error}");
    }
    look
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
    fn what_is_no_file_or_endless_blocks_nobody() {
        let directory = std::env::temp_dir().join(format!("lanlet-servers-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("resolv.conf");
        let servers = |path: &std::path::Path| {
            let mut servers = Servers::new(ResolverConfig {
                resolv_conf: path.to_owned(),
                ..ResolverConfig::default()
            });
            let begun = Instant::now();
            let found = servers.in_order(begun);
            // Far from a block, whatever the machine has to do.
            assert!(begun.elapsed() < Duration::from_secs(20), "{path:?}");
            found
        };
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap();
        for special in [&*path, &*directory, std::path::Path::new("/dev/zero")] {
            assert_eq!(servers(special), [], "{special:?}");
        }
        std::fs::remove_file(&path).unwrap();
        // 1 TiB, of which the beginning is read.
        std::fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        assert_eq!(servers(&path), [([10, 0, 0, 1], 53).into()]);
        std::fs::remove_dir_all(directory).unwrap();
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
