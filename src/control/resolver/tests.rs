//! Against real UDP sockets on loopback.

use super::*;
use crate::frame::{Mac, PortId};
use crate::gateway::dns::QueryId;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::mpsc as std_mpsc;

const GUEST_ID: [u8; 2] = [0xab, 0xcd];

/// A query for `name`, type A.
fn question(name: &str) -> Vec<u8> {
    let mut query = vec![GUEST_ID[0], GUEST_ID[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    query
}

fn answer_to(query: &[u8], code: u8) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer[3] = 0x80 | code;
    answer
}

/// An address of 127/8 for each server, so that they can share a port.
fn server_address(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 53, last).into()
}

/// A port that is free on all of 127/8, different for each test of this process.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let base = 20_000 + (std::process::id() % 20_000) as u16;
        let port = base + NEXT.fetch_add(1, Relaxed);
        if std::net::UdpSocket::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

async fn serve(address: IpAddr, port: u16) -> UdpSocket {
    UdpSocket::bind((address, port)).await.unwrap()
}

async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 4096];
    let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
    buffer.truncate(len);
    (buffer, from)
}

fn config(servers: &[IpAddr], port: u16) -> ResolverConfig {
    ResolverConfig {
        servers: servers.to_vec(),
        resolv_conf: "/nonexistent/resolv.conf".into(),
        port,
    }
}

fn query(id: u64, message: Vec<u8>) -> DnsQuery {
    DnsQuery {
        id: QueryId(id),
        port: PortId(1),
        reply_to: (
            Mac([2, 0, 0, 0, 0, 1]),
            Ipv4Addr::new(192, 168, 122, 9),
            5353,
        ),
        message: message.into(),
    }
}

/// Runs `test` beside a resolver; it gets the handle, a sink, and where the sink's answers arrive.
fn with_resolver<F, T>(config: ResolverConfig, test: F)
where
    F: FnOnce(ResolverHandle, AnswerSink, mpsc::UnboundedReceiver<DnsAnswer>) -> T,
    T: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (resolver, handle) = Resolver::new(config);
        let (sender, answers) = mpsc::unbounded_channel();
        let sink: AnswerSink = Arc::new(move |answer| sender.send(answer).unwrap());
        let run = tokio::spawn(resolver.run());
        tokio::time::timeout(Duration::from_secs(20), test(handle, sink, answers))
            .await
            .expect("the test ends");
        // All handles are gone: the task ends by itself.
        tokio::time::timeout(Duration::from_secs(10), run)
            .await
            .expect("ends")
            .unwrap();
    });
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
struct Dnsmasq(Child);

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_real_server_answers() {
    let port = free_port();
    let address = server_address(9);
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
        return;
    };
    let _dnsmasq = Dnsmasq(
        Command::new(program)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
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
