//! Against real sockets on loopback.

use super::*;
use crate::frame::Mac;
use crate::gateway::dns::QueryId;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

pub(super) const GUEST_ID: [u8; 2] = [0xab, 0xcd];

/// A query for `name`, type A.
pub(super) fn question(name: &str) -> Vec<u8> {
    let mut query = vec![GUEST_ID[0], GUEST_ID[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    query
}

pub(super) fn answer_to(query: &[u8], code: u8) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer[3] = 0x80 | code;
    answer
}

/// An address of 127/8 for each server, so that they can share a port.
pub(super) fn server_address(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 53, last).into()
}

/// A port that is free on all of 127/8, different for each test of this process.
pub(super) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let base = 20_000 + (std::process::id() % 20_000) as u16;
        let port = base + NEXT.fetch_add(1, Relaxed);
        if std::net::UdpSocket::bind(("0.0.0.0", port)).is_ok()
            && std::net::TcpListener::bind(("0.0.0.0", port)).is_ok()
        {
            return port;
        }
    }
}

pub(super) async fn serve(address: IpAddr, port: u16) -> UdpSocket {
    UdpSocket::bind((address, port)).await.unwrap()
}

pub(super) async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 4096];
    let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
    buffer.truncate(len);
    (buffer, from)
}

pub(super) fn config(servers: &[IpAddr], port: u16) -> ResolverConfig {
    ResolverConfig {
        servers: servers.to_vec(),
        resolv_conf: "/nonexistent/resolv.conf".into(),
        port,
    }
}

pub(super) fn query(id: u64, message: Vec<u8>) -> DnsQuery {
    DnsQuery {
        id: QueryId(id),
        port: PortId(1),
        reply_to: (
            Mac([2, 0, 0, 0, 0, 1]),
            Ipv4Addr::new(192, 168, 122, 9).into(),
            5353,
        ),
        message: message.into(),
    }
}

/// Runs `test` beside a resolver; it gets the handle, a sink, and where the sink's answers arrive.
pub(super) fn with_resolver<F, T>(config: ResolverConfig, test: F)
where
    F: FnOnce(ResolverHandle, AnswerSink, mpsc::UnboundedReceiver<DnsAnswer>) -> T,
    T: Future<Output = ()>,
{
    with_policy(config, Arc::new(AllowAll), test);
}

/// As [`with_resolver`], with a policy.
pub(super) fn with_policy<F, T>(config: ResolverConfig, policy: Arc<dyn NamePolicy>, test: F)
where
    F: FnOnce(ResolverHandle, AnswerSink, mpsc::UnboundedReceiver<DnsAnswer>) -> T,
    T: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (resolver, handle) = Resolver::with_policy(config, policy);
        let (sender, answers) = mpsc::unbounded_channel();
        let sink: AnswerSink = Arc::new(move |answer| sender.send(answer).unwrap());
        let run = tokio::spawn(resolver.run());
        tokio::time::timeout(Duration::from_secs(30), test(handle, sink, answers))
            .await
            .expect("the test ends");
        // All handles are gone: the task ends by itself.
        tokio::time::timeout(Duration::from_secs(15), run)
            .await
            .expect("ends")
            .unwrap();
    });
}

/// Takes one connection, reads one query and returns it with a way to answer.
pub(super) async fn receive_tcp(listener: &TcpListener) -> (Vec<u8>, tokio::net::TcpStream) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut query).await.unwrap();
    (query, stream)
}

pub(super) async fn answer_tcp(mut stream: tokio::net::TcpStream, message: &[u8]) {
    stream.write_all(&upstream::framed(message)).await.unwrap();
}

/// An answer with TC set.
pub(super) fn cut(query: &[u8]) -> Vec<u8> {
    let mut answer = answer_to(query, 0);
    answer[2] |= 2;
    answer
}

/// An answer of `len` bytes: the question and one TXT record.
pub(super) fn long_answer(query: &[u8], len: usize) -> Vec<u8> {
    let mut answer = answer_to(query, 0);
    answer[7] = 1;
    answer.extend_from_slice(&[0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60]);
    let data = len - answer.len() - 2;
    answer.extend_from_slice(&(data as u16).to_be_bytes());
    answer.resize(len, b'x');
    answer
}

pub(super) fn counter(handle: &ResolverHandle, name: &str) -> u64 {
    let mut counters = handle.counters();
    counters.find(|&(other, _)| other == name).unwrap().1
}

#[test]
fn forwards_with_another_id_and_port_and_restores_the_guests_id() {
    let port = free_port();
    with_resolver(
        config(&[server_address(1)], port),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            let (mut ids, mut ports) = (Vec::new(), Vec::new());
            for n in 0..20 {
                let asked = question("Example.com");
                handle.ask(query(n, asked.clone()), &sink).unwrap();
                let (seen, from) = receive(&server).await;
                assert_eq!(seen[2..], asked[2..]);
                ids.push(seen[..2].to_vec());
                ports.push(from.port());
                server.send_to(&answer_to(&seen, 0), from).await.unwrap();
                let answer = answers.recv().await.unwrap();
                assert_eq!(answer.id, QueryId(n));
                assert_eq!(answer.message[..], answer_to(&asked, 0));
            }
            for seen in [ids.len(), ports.len()] {
                assert_eq!(seen, 20);
            }
            ids.sort();
            ids.dedup();
            ports.sort();
            ports.dedup();
            assert!(ids.len() >= 18 && ports.len() >= 15, "{ids:?} {ports:?}");
            assert_eq!(handle.upstream(), Some((server_address(1), port).into()));
        },
    );
}

#[test]
fn takes_only_the_answer_to_its_question_from_the_server_asked() {
    let port = free_port();
    with_resolver(
        config(&[server_address(1)], port),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            let stranger = serve(server_address(2), port).await;
            let asked = question("bank.example");
            handle.ask(query(1, asked.clone()), &sink).unwrap();
            let (seen, from) = receive(&server).await;
            let right = answer_to(&seen, 0);
            let mut wrong_id = right.clone();
            wrong_id[0] ^= 1;
            let mut wrong_name = right.clone();
            wrong_name[14] = b'z';
            let mut no_question = right[..12].to_vec();
            no_question[5] = 0;
            for forged in [
                &wrong_id,
                &wrong_name,
                &no_question,
                &seen,
                &vec![],
                &vec![0; 11],
            ] {
                server.send_to(forged, from).await.unwrap();
            }
            stranger.send_to(&answer_to(&seen, 3), from).await.unwrap();
            let mut other_case = right.clone();
            other_case[13..17].make_ascii_uppercase();
            server.send_to(&other_case, from).await.unwrap();
            let answer = answers.recv().await.unwrap();
            assert_eq!(answer.message[..2], GUEST_ID);
            assert_eq!(answer.message[2..], other_case[2..]);
            assert!(answers.try_recv().is_err(), "one answer");
        },
    );
}

#[test]
fn fails_over_on_silence_refusal_and_a_closed_port_and_stays_there() {
    let port = free_port();
    let servers: Vec<_> = (1..=4).map(server_address).collect();
    with_resolver(config(&servers, port), async |handle, sink, mut answers| {
        let silent = serve(servers[0], port).await;
        let refusing = serve(servers[1], port).await;
        // servers[2] is closed: ICMP port unreachable.
        let good = serve(servers[3], port).await;
        assert_eq!(handle.upstream(), Some((servers[0], port).into()));
        let started = Instant::now();
        handle.ask(query(1, question("a.example")), &sink).unwrap();
        receive(&silent).await;
        let (seen, from) = receive(&refusing).await;
        refusing.send_to(&answer_to(&seen, 5), from).await.unwrap();
        let (seen, from) = receive(&good).await;
        good.send_to(&answer_to(&seen, 0), from).await.unwrap();
        assert_eq!(answers.recv().await.unwrap().message[3] & 15, 0);
        let took = started.elapsed();
        assert!(
            took >= ATTEMPT_TIMEOUT && took < 2 * ATTEMPT_TIMEOUT,
            "{took:?}"
        );
        assert_eq!(handle.upstream(), Some((servers[3], port).into()));

        let started = Instant::now();
        handle.ask(query(2, question("b.example")), &sink).unwrap();
        let (seen, from) = receive(&good).await;
        good.send_to(&answer_to(&seen, 3), from).await.unwrap();
        assert_eq!(
            answers.recv().await.unwrap().message[3] & 15,
            3,
            "NXDOMAIN is an answer"
        );
        assert!(started.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn a_lost_query_is_asked_again() {
    let port = free_port();
    with_resolver(
        config(&[server_address(1)], port),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            handle.ask(query(1, question("a.example")), &sink).unwrap();
            receive(&server).await;
            let (seen, from) = receive(&server).await;
            server.send_to(&answer_to(&seen, 0), from).await.unwrap();
            assert_eq!(answers.recv().await.unwrap().message[3] & 15, 0);
        },
    );
}

#[test]
fn answers_servfail_when_no_server_is_known_or_none_works() {
    with_resolver(config(&[], 53), async |handle, sink, mut answers| {
        assert_eq!(handle.upstream(), None);
        handle.ask(query(9, question("a.example")), &sink).unwrap();
        let answer = answers.recv().await.unwrap();
        let mut expected = answer_to(&question("a.example"), 2);
        expected[2] = 0x81;
        assert_eq!(
            (answer.id, &answer.message[..]),
            (QueryId(9), &expected[..])
        );
    });
    let port = free_port();
    with_resolver(
        config(&[server_address(1)], port),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            handle.ask(query(1, question("a.example")), &sink).unwrap();
            let (seen, from) = receive(&server).await;
            let mut detailed = answer_to(&seen, 2);
            detailed[3] |= 0x20;
            server.send_to(&detailed, from).await.unwrap();
            let answer = answers.recv().await.unwrap();
            assert_eq!(
                answer.message[3], 0xa2,
                "the server's own SERVFAIL is passed on"
            );
        },
    );
}

#[test]
fn all_queries_of_a_burst_are_answered() {
    let port = free_port();
    with_resolver(
        config(&[server_address(1)], port),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            let count = QUERIES_MAX as u64;
            for n in 0..count {
                handle
                    .ask(query(n, question("burst.example")), &sink)
                    .unwrap();
            }
            let refused = handle
                .ask(query(count, question("burst.example")), &sink)
                .unwrap_err();
            assert_eq!(refused.id, QueryId(count));
            let mut seen = Vec::new();
            for _ in 0..count {
                let (query, from) = receive(&server).await;
                server.send_to(&answer_to(&query, 0), from).await.unwrap();
                // Reading as we go: the burst must not overflow the socket buffers.
                while let Ok(answer) = answers.try_recv() {
                    seen.push(answer.id);
                }
            }
            while (seen.len() as u64) < count {
                seen.push(answers.recv().await.unwrap().id);
            }
            seen.sort();
            seen.dedup();
            assert_eq!(seen.len() as u64, count);
        },
    );
}

#[test]
fn an_ipv6_server() {
    let port = free_port();
    if std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, port)).is_err() {
        eprintln!("no IPv6 loopback here");
        return;
    }
    let address = IpAddr::from(Ipv6Addr::LOCALHOST);
    with_resolver(
        config(&[address], port),
        async |handle, sink, mut answers| {
            let server = serve(address, port).await;
            handle
                .ask(query(1, question("six.example")), &sink)
                .unwrap();
            let (seen, from) = receive(&server).await;
            server.send_to(&answer_to(&seen, 0), from).await.unwrap();
            assert_eq!(answers.recv().await.unwrap().message[3] & 15, 0);
        },
    );
}

#[test]
fn a_sink_may_belong_to_another_thread() {
    let port = free_port();
    let (sender, receiver) = std_mpsc::channel();
    with_resolver(config(&[server_address(1)], port), async |handle, _, _| {
        let server = serve(server_address(1), port).await;
        let sink: AnswerSink = Arc::new(move |answer| sender.send(answer).unwrap());
        let worker = std::thread::spawn({
            let handle = handle.clone();
            move || {
                handle.ask(query(5, question("t.example")), &sink).unwrap();
                receiver.recv_timeout(Duration::from_secs(10)).unwrap()
            }
        });
        let (seen, from) = receive(&server).await;
        server.send_to(&answer_to(&seen, 0), from).await.unwrap();
        let answer = tokio::task::spawn_blocking(|| worker.join().unwrap())
            .await
            .unwrap();
        assert_eq!(answer.id, QueryId(5));
    });
}

/// dnsmasq on loopback, ended with the test.
pub(super) struct Dnsmasq(Child);

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// dnsmasq at this address, if it is installed: guest.example is 192.0.2.7, and big.example has a TXT
/// record that does not fit a datagram without EDNS.
pub(super) fn dnsmasq(address: IpAddr, port: u16) -> Option<Dnsmasq> {
    let arguments = [
        "--keep-in-foreground".to_owned(),
        "--conf-file=/dev/null".to_owned(),
        "--no-resolv".to_owned(),
        "--no-hosts".to_owned(),
        "--bind-interfaces".to_owned(),
        "--pid-file=".to_owned(),
        format!("--listen-address={address}"),
        format!("--port={port}"),
        "--address=/guest.example/192.0.2.7".to_owned(),
        format!(
            "--txt-record=big.example,{}",
            vec!["x".repeat(200); 5].join(",")
        ),
    ];
    let program = [
        "/usr/sbin/dnsmasq",
        "/usr/bin/dnsmasq",
        "/usr/local/sbin/dnsmasq",
    ]
    .into_iter()
    .find(|path| Path::new(path).exists());
    let Some(program) = program else {
        eprintln!("no dnsmasq here");
        return None;
    };
    let child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Some(Dnsmasq(child.unwrap()))
}

#[test]
fn a_real_server_answers() {
    let port = free_port();
    let address = server_address(9);
    let Some(_dnsmasq) = dnsmasq(address, port) else {
        return;
    };
    with_resolver(
        config(&[address], port),
        async |handle, sink, mut answers| {
            // Until dnsmasq listens, its port is closed and the answer is SERVFAIL.
            let mut answer = None;
            for n in 0..50 {
                handle
                    .ask(query(n, question("guest.example")), &sink)
                    .unwrap();
                let got = answers.recv().await.unwrap().message;
                if got[3] & 15 == 0 {
                    answer = Some(got);
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let answer = answer.expect("dnsmasq answers");
            assert_eq!(answer[..2], GUEST_ID);
            assert_eq!(answer[6..8], [0, 1]);
            assert!(answer.ends_with(&[192, 0, 2, 7]));
        },
    );
}

#[test]
fn about_udp_the_policy_is_not_asked_twice() {
    struct Nothing;
    impl NamePolicy for Nothing {
        fn allows(&self, _: PortId, name: &Name) -> Option<oneshot::Receiver<bool>> {
            panic!("{name}: the worker has asked")
        }

        fn on_answer(&self, _: PortId, _: &[u8]) -> Option<oneshot::Receiver<()>> {
            panic!("the worker sees it")
        }
    }
    let port = free_port();
    let config = config(&[server_address(1)], port);
    with_policy(
        config,
        Arc::new(Nothing),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            handle.ask(query(2, question("a.example")), &sink).unwrap();
            let (seen, from) = receive(&server).await;
            server.send_to(&answer_to(&seen, 0), from).await.unwrap();
            let answer = answers.recv().await.unwrap().message;
            assert_eq!(answer, answer_to(&question("a.example"), 0));
        },
    );
}

#[test]
fn who_asks_over_udp_gets_the_cut_answer() {
    let port = free_port();
    with_resolver(
        config(&[server_address(1)], port),
        async |handle, sink, mut answers| {
            let server = serve(server_address(1), port).await;
            let asked = question("big.example");
            handle.ask(query(1, asked.clone()), &sink).unwrap();
            let (seen, from) = receive(&server).await;
            server.send_to(&cut(&seen), from).await.unwrap();
            assert_eq!(answers.recv().await.unwrap().message, cut(&asked));
            assert_eq!(counter(&handle, "dns_upstream_tcp"), 0);
        },
    );
}

#[test]
fn use_vc_asks_over_tcp_alone() {
    let port = free_port();
    let address = server_address(1);
    let path = std::env::temp_dir().join(format!("lanlet-use-vc-{}.conf", std::process::id()));
    std::fs::write(&path, format!("nameserver {address}\noptions use-vc\n")).unwrap();
    let config = ResolverConfig {
        servers: Vec::new(),
        resolv_conf: path.clone(),
        port,
    };
    with_resolver(config, async |handle, sink, mut answers| {
        let silent = serve(address, port).await;
        let listener = TcpListener::bind((address, port)).await.unwrap();
        let asked = question("a.example");
        handle.ask(query(1, asked.clone()), &sink).unwrap();
        let (seen, stream) = receive_tcp(&listener).await;
        answer_tcp(stream, &answer_to(&seen, 0)).await;
        assert_eq!(answers.recv().await.unwrap().message, answer_to(&asked, 0));
        assert!(silent.try_recv_from(&mut [0; 10]).is_err());
    });
    std::fs::remove_file(&path).unwrap();
}
