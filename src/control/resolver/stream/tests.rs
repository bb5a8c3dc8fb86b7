//! Over socket pairs as the NAT makes them, against real servers on loopback.

use super::super::tests::{
    answer_tcp, answer_to, config, counter, cut, dnsmasq, free_port, long_answer, question,
    receive, receive_tcp, serve, server_address, with_policy, with_resolver,
};
use super::super::{AllowAll, NamePolicy, ResolverConfig, ResolverHandle, Upstream};
use super::*;
use crate::gateway::dns::message::Name;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::oneshot;

const PORT: PortId = PortId(3);

fn guest(last: u8) -> SocketAddr {
    (Ipv4Addr::new(192, 168, 122, last), 40_000).into()
}

/// The guest's end of a connection.
struct Client(UnixStream);

impl Client {
    fn pair() -> (Self, OwnedFd) {
        let (own, other) = UnixStream::pair().unwrap();
        (Self(own), other.into_std().unwrap().into())
    }

    fn new(handle: &ResolverHandle, port: PortId, guest: SocketAddr) -> Self {
        let (client, fd) = Self::pair();
        handle.serve(fd, port, guest);
        client
    }

    async fn send(&mut self, message: &[u8]) {
        self.0.write_all(&framed(message)).await.unwrap();
    }

    async fn receive(&mut self) -> Vec<u8> {
        let len = self.0.read_u16().await.expect("an answer");
        let mut message = vec![0; usize::from(len)];
        self.0.read_exact(&mut message).await.unwrap();
        message
    }

    /// Whether the resolver ended the connection, with nothing more said.
    async fn is_ended(&mut self) -> bool {
        let ended = self.0.read_u8().await.unwrap_err().kind();
        [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&ended)
    }
}

fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    message[..2].copy_from_slice(&id.to_be_bytes());
    message
}

/// Answers every query that comes.
async fn echo(server: UdpSocket) {
    loop {
        let (seen, from) = receive(&server).await;
        server.send_to(&answer_to(&seen, 0), from).await.unwrap();
    }
}

#[test]
fn queries_one_after_the_other_and_a_half_close() {
    let port = free_port();
    with_resolver(config(&[server_address(1)], port), async |handle, _, _| {
        let server = serve(server_address(1), port).await;
        let mut client = Client::new(&handle, PORT, guest(9));
        for n in 0..3 {
            let asked = with_id(question("a.example"), n);
            client.send(&asked).await;
            let (seen, from) = receive(&server).await;
            assert_eq!(seen[2..], asked[2..]);
            server.send_to(&answer_to(&seen, 0), from).await.unwrap();
            assert_eq!(client.receive().await, answer_to(&asked, 0));
        }
        // The answer comes behind the guest's end of stream, and then ours.
        client.send(&question("b.example")).await;
        client.0.shutdown().await.unwrap();
        let (seen, from) = receive(&server).await;
        server.send_to(&answer_to(&seen, 3), from).await.unwrap();
        assert_eq!(client.receive().await[3] & 15, 3);
        assert!(client.is_ended().await);
        let counters: Vec<_> = handle.counters().filter(|&(_, n)| n != 0).collect();
        let expected = [
            ("dns_tcp_connections", 1),
            ("dns_tcp_queries", 4),
            ("dns_tcp_answers", 4),
        ];
        assert_eq!(counters, expected);
    });
}

#[test]
fn a_cut_answer_is_fetched_over_tcp() {
    let port = free_port();
    let address = server_address(1);
    with_resolver(config(&[address], port), async |handle, _, _| {
        let server = serve(address, port).await;
        let listener = TcpListener::bind((address, port)).await.unwrap();
        let mut client = Client::new(&handle, PORT, guest(9));
        let asked = question("big.example");
        client.send(&asked).await;
        let (first, from) = receive(&server).await;
        server.send_to(&cut(&first), from).await.unwrap();
        let (second, stream) = receive_tcp(&listener).await;
        assert_eq!(second[2..], asked[2..]);
        answer_tcp(stream, &long_answer(&second, 65_535)).await;
        assert_eq!(client.receive().await, long_answer(&asked, 65_535));
        assert_eq!(counter(&handle, "dns_upstream_tcp"), 1);
    });
}

/// Makes of a query what a server answers.
type Forge = fn(&[u8]) -> Vec<u8>;

#[test]
fn over_tcp_too_only_the_answer_to_the_question_counts() {
    let forged: [Forge; 5] = [
        |query| {
            with_id(
                answer_to(query, 0),
                !u16::from_be_bytes([query[0], query[1]]),
            )
        },
        |query| [&answer_to(query, 0)[..12], &question("b.example")[12..]].concat(),
        |query| query.to_vec(),
        |_| vec![],
        |query| answer_to(query, 0)[..11].to_vec(),
    ];
    for forge in forged {
        let port = free_port();
        let servers = [server_address(1), server_address(2)];
        with_resolver(config(&servers, port), async |handle, _, _| {
            let first = serve(servers[0], port).await;
            let first_tcp = TcpListener::bind((servers[0], port)).await.unwrap();
            let second = serve(servers[1], port).await;
            let mut client = Client::new(&handle, PORT, guest(9));
            let asked = question("a.example");
            client.send(&asked).await;
            let (seen, from) = receive(&first).await;
            first.send_to(&cut(&seen), from).await.unwrap();
            let (seen, stream) = receive_tcp(&first_tcp).await;
            answer_tcp(stream, &forge(&seen)).await;
            let (seen, from) = receive(&second).await;
            second.send_to(&answer_to(&seen, 3), from).await.unwrap();
            assert_eq!(client.receive().await, answer_to(&asked, 3));
        });
    }
}

#[test]
fn a_server_that_answers_over_tcp_only_is_found_and_servfail_if_none_does() {
    let port = free_port();
    let address = server_address(1);
    with_resolver(config(&[address], port), async |handle, _, _| {
        let silent = serve(address, port).await;
        let listener = TcpListener::bind((address, port)).await.unwrap();
        let mut client = Client::new(&handle, PORT, guest(9));
        let asked = question("a.example");
        client.send(&asked).await;
        receive(&silent).await;
        let (seen, stream) = receive_tcp(&listener).await;
        answer_tcp(stream, &answer_to(&seen, 0)).await;
        assert_eq!(client.receive().await, answer_to(&asked, 0));
        // Cut over UDP, and nobody there over TCP.
        drop(listener);
        client.send(&asked).await;
        let (seen, from) = receive(&silent).await;
        silent.send_to(&cut(&seen), from).await.unwrap();
        let failure = client.receive().await;
        assert_eq!((failure[2] & 2, failure[3] & 15), (0, 2));
        assert_eq!(counter(&handle, "dns_upstream_failed"), 1);
    });
}

#[test]
fn a_server_over_ipv6() {
    let port = free_port();
    let address = IpAddr::from(Ipv6Addr::LOCALHOST);
    if std::net::TcpListener::bind((address, port)).is_err() {
        eprintln!("no IPv6 loopback here");
        return;
    }
    with_resolver(config(&[address], port), async |handle, _, _| {
        let server = serve(address, port).await;
        let listener = TcpListener::bind((address, port)).await.unwrap();
        let guest = (Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9), 4_000).into();
        let mut client = Client::new(&handle, PORT, guest);
        let asked = question("six.example");
        client.send(&asked).await;
        let (seen, from) = receive(&server).await;
        server.send_to(&cut(&seen), from).await.unwrap();
        let (seen, stream) = receive_tcp(&listener).await;
        answer_tcp(stream, &long_answer(&seen, 5_000)).await;
        assert_eq!(client.receive().await, long_answer(&asked, 5_000));
    });
}

#[test]
fn pipelined_queries_are_answered_as_the_answers_come() {
    let port = free_port();
    with_resolver(config(&[server_address(1)], port), async |handle, _, _| {
        let server = serve(server_address(1), port).await;
        let mut client = Client::new(&handle, PORT, guest(9));
        let count = PIPELINE_MAX as u16 + 10;
        let all: Vec<u8> = (0..count)
            .flat_map(|n| framed(&with_id(question(&format!("n{n}.example")), n)))
            .collect();
        client.0.write_all(&all).await.unwrap();
        let mut seen = Vec::new();
        for _ in 0..PIPELINE_MAX {
            seen.push(receive(&server).await);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let more = server.try_recv_from(&mut [0; 10]);
        assert!(more.is_err(), "the next waits for an answer");
        for (query, from) in seen.iter().rev() {
            server.send_to(&answer_to(query, 0), from).await.unwrap();
            tokio::task::yield_now().await;
        }
        let rest = async {
            for _ in PIPELINE_MAX..usize::from(count) {
                let (query, from) = receive(&server).await;
                server.send_to(&answer_to(&query, 0), from).await.unwrap();
            }
        };
        let answers = async {
            let mut ids = Vec::new();
            for _ in 0..count {
                let answer = client.receive().await;
                let id = u16::from_be_bytes([answer[0], answer[1]]);
                let asked = with_id(question(&format!("n{id}.example")), id);
                assert_eq!(answer, answer_to(&asked, 0));
                ids.push(id);
            }
            ids
        };
        let ((), mut ids) = tokio::join!(rest, answers);
        assert_ne!(ids, (0..count).collect::<Vec<_>>(), "out of order");
        ids.sort();
        assert_eq!(ids, (0..count).collect::<Vec<_>>());
    });
}

#[test]
fn a_port_has_its_share_of_the_queries_and_leaves_others_theirs() {
    let port = free_port();
    with_resolver(config(&[server_address(1)], port), async |handle, _, _| {
        let server = serve(server_address(1), port).await;
        let mut clients = Vec::new();
        let connections = STREAM_QUERIES_PER_PORT_MAX / PIPELINE_MAX + 2;
        for n in 0..connections {
            let mut client = Client::new(&handle, PORT, guest(n as u8 + 2));
            for id in 0..PIPELINE_MAX as u16 {
                client.send(&with_id(question("greedy.example"), id)).await;
            }
            clients.push(client);
        }
        let mut held = Vec::new();
        for _ in 0..STREAM_QUERIES_PER_PORT_MAX {
            held.push(receive(&server).await);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(server.try_recv_from(&mut [0; 10]).is_err());
        let mut other = Client::new(&handle, PortId(4), guest(2));
        other.send(&question("modest.example")).await;
        let (seen, from) = receive(&server).await;
        server.send_to(&answer_to(&seen, 0), from).await.unwrap();
        assert_eq!(
            other.receive().await,
            answer_to(&question("modest.example"), 0)
        );
        // All are answered in the end.
        for (query, from) in held {
            server.send_to(&answer_to(&query, 0), from).await.unwrap();
        }
        let answering = tokio::spawn(echo(server));
        for client in &mut clients {
            for _ in 0..PIPELINE_MAX {
                client.receive().await;
            }
        }
        answering.abort();
        assert_eq!(
            counter(&handle, "dns_tcp_answers"),
            16 * connections as u64 + 1
        );
    });
}

#[test]
fn trickled_queries_oversized_ones_and_rubbish() {
    let port = free_port();
    with_resolver(config(&[server_address(1)], port), async |handle, _, _| {
        let answering = tokio::spawn(echo(serve(server_address(1), port).await));
        let asked = question("a.example");
        let mut client = Client::new(&handle, PORT, guest(9));
        for &byte in &[framed(&asked), framed(&asked)].concat() {
            client.0.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for _ in 0..2 {
            assert_eq!(client.receive().await, answer_to(&asked, 0));
        }
        // Queries that get an error, the connection goes on behind them.
        let transfer = [&asked[..asked.len() - 4], &[0, 252, 0, 1]].concat();
        let mut oversized = asked.clone();
        oversized.resize(65_535, 0);
        let mut barely = asked.clone();
        barely.resize(QUERY_LEN_MAX + 1, 0);
        let trailing = [&asked[..], &[0]].concat();
        for (bad, code) in [
            (&transfer, Rcode::Refused),
            (&oversized, Rcode::FormErr),
            (&barely, Rcode::FormErr),
            (&trailing, Rcode::FormErr),
        ] {
            client.send(bad).await;
            let answer = client.receive().await;
            assert_eq!(answer, message::header_only(&asked, code), "{}", bad.len());
            client.send(&asked).await;
            assert_eq!(client.receive().await, answer_to(&asked, 0));
        }
        assert_eq!(counter(&handle, "dns_tcp_refused"), 4);
        // What is no query ends it.
        for rubbish in [&[][..], &asked[..11], &answer_to(&asked, 0)] {
            let mut client = Client::new(&handle, PORT, guest(9));
            client.send(&asked).await;
            client.send(rubbish).await;
            client.send(&asked).await;
            let answer = client.receive().await;
            assert_eq!(
                answer,
                answer_to(&asked, 0),
                "what came before it is answered"
            );
            assert!(client.is_ended().await);
        }
        assert_eq!(counter(&handle, "dns_tcp_malformed"), 3);
        // Half a message and the end of the stream.
        let mut client = Client::new(&handle, PORT, guest(9));
        client.0.write_all(&framed(&asked)[..20]).await.unwrap();
        client.0.shutdown().await.unwrap();
        assert!(client.is_ended().await);
        answering.abort();
    });
}

#[test]
fn who_does_not_write_or_does_not_read_is_disconnected() {
    let port = free_port();
    let address = server_address(1);
    with_resolver(config(&[address], port), async |handle, _, _| {
        let server = serve(address, port).await;
        let listener = TcpListener::bind((address, port)).await.unwrap();
        let asked = question("big.example");
        let serving = tokio::spawn(async move {
            loop {
                let (seen, from) = receive(&server).await;
                server.send_to(&cut(&seen), from).await.unwrap();
                let (seen, stream) = receive_tcp(&listener).await;
                answer_tcp(stream, &long_answer(&seen, 60_000)).await;
            }
        });
        let started = Instant::now();
        let in_time = || {
            let took = started.elapsed();
            took >= IDLE_TIMEOUT && took < IDLE_TIMEOUT + Duration::from_secs(4)
        };
        let mut silent = Client::new(&handle, PORT, guest(2));
        let silent = async {
            assert!(silent.is_ended().await);
            assert!(in_time());
        };
        let mut trickling = Client::new(&handle, PORT, guest(3));
        let trickling = async {
            for &byte in framed(&asked).iter().take(24) {
                if trickling.0.write_all(&[byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(480)).await;
            }
            assert!(trickling.is_ended().await);
            assert!(in_time());
        };
        let mut deaf = Client::new(&handle, PORT, guest(4));
        let deaf = async {
            for _ in 0..PIPELINE_MAX {
                deaf.send(&asked).await;
            }
            tokio::time::sleep(WRITE_TIMEOUT + Duration::from_secs(3)).await;
            // What fits the socket's buffer is there, then the end.
            let mut got = Vec::new();
            let _ = deaf.0.read_to_end(&mut got).await;
            assert!(got.len() < PIPELINE_MAX * 60_002, "{}", got.len());
        };
        let mut busy = Client::new(&handle, PORT, guest(5));
        let busy = async {
            // Longer than any timeout, with pauses shorter than them.
            for _ in 0..3 {
                busy.send(&asked).await;
                assert_eq!(busy.receive().await.len(), 60_000);
                tokio::time::sleep(Duration::from_secs(4)).await;
            }
        };
        tokio::join!(silent, trickling, deaf, busy);
        assert_eq!(counter(&handle, "dns_tcp_timeouts"), 3);
        serving.abort();
    });
}

/// Waits for what other tasks are about to do.
async fn until(done: impl Fn() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not happen");
}

fn block_on(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test);
}

fn service(config: ResolverConfig) -> Arc<Service> {
    Arc::new(Service {
        upstream: Upstream::new(config),
        policy: Arc::new(AllowAll),
        counters: Counters::default(),
    })
}

#[test]
fn connections_are_limited_per_address_per_port_and_in_total() {
    block_on(async {
        let service = service(config(&[], 53));
        let mut streams = Streams::new(Arc::clone(&service));
        let mut clients = Vec::new();
        let mut connect = |streams: &mut Streams, port: u16, last: u8| {
            let before = streams.open.lock().unwrap().len();
            let (client, fd) = Client::pair();
            let (port, guest) = (PortId(port), guest(last));
            streams.accept(Connection { fd, port, guest });
            clients.push(client);
            streams.open.lock().unwrap().len() - before
        };
        let mut opened = 0;
        for _ in 0..100 {
            opened += connect(&mut streams, 1, 2);
        }
        assert_eq!(opened, STREAMS_PER_ADDRESS_MAX);
        for last in 0..100 {
            opened += connect(&mut streams, 1, 100 + last);
        }
        assert_eq!(opened, STREAMS_PER_PORT_MAX);
        for port in 2..100 {
            for last in 0..5 {
                opened += connect(&mut streams, port, last);
            }
        }
        assert_eq!(opened, STREAMS_MAX);
        let limited = service
            .counters
            .tcp_limited
            .load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(limited as usize, clients.len() - STREAMS_MAX);
        for client in &mut clients[STREAMS_PER_ADDRESS_MAX..100] {
            assert!(client.is_ended().await);
        }
        // Each that ends makes room, and nothing is left in the end.
        drop(clients);
        let open = Arc::clone(&streams.open);
        until(|| open.lock().unwrap().is_empty()).await;
        let (_client, fd) = Client::pair();
        let (port, guest) = (PORT, guest(9));
        streams.accept(Connection { fd, port, guest });
        assert_eq!(open.lock().unwrap().len(), 1);
        assert_eq!(
            streams.per_port.len(),
            1,
            "the ports that went are forgotten"
        );
        assert_eq!(streams.queries.available_permits(), STREAM_QUERIES_MAX);
    });
}

#[test]
fn a_guest_that_goes_away_leaves_nothing_behind() {
    block_on(async {
        let port = free_port();
        let server = serve(server_address(1), port).await;
        let mut streams = Streams::new(service(config(&[server_address(1)], port)));
        let mut clients = Vec::new();
        for n in 0..3 {
            let (mut client, fd) = Client::pair();
            let (port, guest) = (PORT, guest(n));
            streams.accept(Connection { fd, port, guest });
            for _ in 0..PIPELINE_MAX {
                client.send(&question("gone.example")).await;
            }
            clients.push(client);
        }
        let mut held = Vec::new();
        for _ in 0..3 * PIPELINE_MAX {
            held.push(receive(&server).await);
        }
        let free = || streams.queries.available_permits();
        assert_eq!(free(), STREAM_QUERIES_MAX - 3 * PIPELINE_MAX);
        // One answer for each that nobody reads: the others are dropped with their connection.
        drop(clients);
        for (query, from) in held {
            server.send_to(&answer_to(&query, 0), from).await.unwrap();
        }
        until(|| streams.open.lock().unwrap().is_empty() && free() == STREAM_QUERIES_MAX).await;
    });
}

#[test]
fn the_policy_holds_over_tcp() {
    struct Policy(Mutex<Vec<oneshot::Sender<()>>>);
    impl NamePolicy for Policy {
        fn allows(&self, port: PortId, name: &Name) -> Option<oneshot::Receiver<bool>> {
            let (sender, receiver) = oneshot::channel();
            // Whoever should decide about c.example is gone.
            if name.to_string() != "c.example" {
                let allowed = (port, name.to_string().as_str()) == (PORT, "a.example");
                sender.send(allowed).unwrap();
            }
            Some(receiver)
        }

        fn on_answer(&self, _: PortId, _: &[u8]) -> Option<oneshot::Receiver<()>> {
            let (sender, receiver) = oneshot::channel();
            self.0.lock().unwrap().push(sender);
            Some(receiver)
        }
    }
    let policy = Arc::new(Policy(Mutex::default()));
    let port = free_port();
    let config = config(&[server_address(1)], port);
    with_policy(config, policy.clone(), async |handle, _, _| {
        let answering = tokio::spawn(echo(serve(server_address(1), port).await));
        let mut client = Client::new(&handle, PORT, guest(9));
        let mut other = Client::new(&handle, PortId(4), guest(9));
        for refused in ["b.example", "c.example"] {
            client.send(&question(refused)).await;
            let refusal = client.receive().await;
            assert_eq!(refusal[3] & 15, 5);
            assert_eq!(refusal[12..], question(refused)[12..]);
        }
        other.send(&question("a.example")).await;
        assert_eq!(other.receive().await[3] & 15, 5);
        client.send(&question("a.example")).await;
        until(|| !policy.0.lock().unwrap().is_empty()).await;
        let early = timeout(Duration::from_millis(100), client.receive()).await;
        assert!(early.is_err(), "not before it is noted");
        policy.0.lock().unwrap().remove(0).send(()).unwrap();
        assert_eq!(client.receive().await, answer_to(&question("a.example"), 0));
        client.send(&question("a.example")).await;
        until(|| !policy.0.lock().unwrap().is_empty()).await;
        // Whoever should take note is gone.
        policy.0.lock().unwrap().clear();
        assert_eq!(client.receive().await, answer_to(&question("a.example"), 0));
        assert_eq!(counter(&handle, "dns_names_denied"), 3);
        answering.abort();
    });
}

#[test]
fn messages_are_cut_the_same_however_the_stream_comes() {
    // splitmix64.
    let mut state = 7766_u64;
    let mut below = |bound: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 27)) % bound as u64) as usize
    };
    block_on(async {
        for _ in 0..200 {
            let (mut lens, mut bytes, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
            for n in 0..20_u8 {
                let len = match below(4) {
                    0 => [0, 1, 11, 12, 13, QUERY_LEN_MAX, QUERY_LEN_MAX + 1, 65_535][below(8)],
                    1 => below(5_000),
                    _ => below(100),
                };
                lens.push((n, len));
                bytes.extend_from_slice(&framed(&vec![n; len]));
            }
            while !bytes.is_empty() {
                let longest = [3, 40, 3_000, 70_000][below(4)];
                let len = (1 + below(longest)).min(bytes.len());
                pieces.push(bytes.drain(..len).collect::<Vec<_>>());
            }
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (half, _keep) = ours.into_split();
            let mut reader = Reader::new(half);
            let writing = async move {
                let mut theirs = theirs;
                for piece in pieces {
                    theirs.write_all(&piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let reading = async {
                for (n, len) in lens {
                    match reader.next().await.unwrap() {
                        Incoming::Message(message) => {
                            assert_eq!(message, vec![n; len]);
                            assert!(len <= QUERY_LEN_MAX);
                        }
                        Incoming::Oversized(header) => {
                            assert_eq!(header, [n; HEADER_LEN]);
                            assert!(len > QUERY_LEN_MAX);
                        }
                        Incoming::End => panic!("too early"),
                    }
                }
                assert!(matches!(reader.next().await.unwrap(), Incoming::End));
            };
            tokio::join!(writing, reading);
        }
    });
}

/// A TCP port whose connections are handed over as the NAT does it.
async fn nat(listener: TcpListener, handle: ResolverHandle) {
    loop {
        let (mut outside, guest) = listener.accept().await.unwrap();
        let (client, fd) = Client::pair();
        handle.serve(fd, PORT, guest);
        tokio::spawn(async move {
            let mut inside = client.0;
            let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
        });
    }
}

async fn dig(port: u16, arguments: &'static [&'static str]) -> String {
    let output = tokio::task::spawn_blocking(move || {
        Command::new("dig")
            .args(["@127.0.0.1", "-p", &port.to_string()])
            .args(["+tcp", "+tries=1", "+time=5"])
            .args(arguments)
            .output()
    });
    String::from_utf8(output.await.unwrap().unwrap().stdout).unwrap()
}

#[test]
fn dig_and_dnsmasq() {
    let port = free_port();
    let address = server_address(9);
    if Command::new("dig").arg("-v").output().is_err() {
        eprintln!("no dig here");
        return;
    }
    let Some(_dnsmasq) = dnsmasq(address, port) else {
        return;
    };
    with_resolver(config(&[address], port), async |handle, _, _| {
        while tokio::net::TcpStream::connect((address, port))
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = listener.local_addr().unwrap().port();
        let nat = tokio::spawn(nat(listener, handle.clone()));
        let answer = dig(tcp, &["guest.example", "A", "+short"]).await;
        assert_eq!(answer, "192.0.2.7\n");
        // Without EDNS it is cut over UDP; with it, not.
        for edns in [&["+noedns"][..], &["+edns"]] {
            let arguments = [&["big.example", "TXT"][..], edns].concat();
            let answer = dig(tcp, arguments.leak()).await;
            assert!(
                answer.contains("status: NOERROR") && !answer.contains(" tc "),
                "{answer}"
            );
            assert_eq!(answer.matches(&"x".repeat(200)).count(), 5, "{answer}");
        }
        assert_eq!(counter(&handle, "dns_upstream_tcp"), 1);
        // One connection, many queries.
        let before = counter(&handle, "dns_tcp_connections");
        let arguments = &[
            "+keepopen",
            "+short",
            "guest.example",
            "a.guest.example",
            "b.guest.example",
        ];
        assert_eq!(dig(tcp, arguments).await, "192.0.2.7\n".repeat(3));
        assert_eq!(counter(&handle, "dns_tcp_connections"), before + 1);
        let answer = dig(tcp, &["guest.example", "AXFR"]).await;
        assert!(answer.contains("Transfer failed"), "{answer}");
        nat.abort();
        let _ = nat.await;
    });
}
