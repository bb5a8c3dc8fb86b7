//! The protocol, over a real socket.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;

const NEED_REPLY: u32 = 1 << 3;

/// A port that listens, and its path.
struct Listening {
    port: Option<VhostUser>,
    path: PathBuf,
}

impl Listening {
    fn start(name: &str) -> Self {
        let name = format!("lanlet-vhost-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = open(listener.into(), false, "test".to_owned(), Arc::default()).unwrap();
        Self {
            port: Some(port),
            path,
        }
    }

    fn port(&mut self) -> &mut VhostUser {
        self.port.as_mut().unwrap()
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        Client { stream }
    }

    /// Sends until that goes as is wanted.
    fn until_sent(&mut self, wanted: Result<(), DropReason>) {
        let begun = Instant::now();
        while self.port().tx.send(plain(&frame(60, 1))) != wanted {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "never {wanted:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        self.port().tx.flush();
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header: Vec<u8> = [request, 1 | flags, payload.len() as u32]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    fn reply(&mut self) -> Vec<u8> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).unwrap();
        let size = u32::from_ne_bytes(header[8..].try_into().unwrap());
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload).unwrap();
        payload
    }

    fn ask(&mut self, request: u32, payload: &[u8]) -> u64 {
        self.send(request, 0, payload, &[]);
        u64::from_ne_bytes(self.reply().try_into().unwrap())
    }

    /// Sends and waits until it is done; whether it went well.
    fn told(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(request, NEED_REPLY, payload, fds);
        u64::from_ne_bytes(self.reply().try_into().unwrap()) == 0
    }

    fn is_cut_off(&mut self) -> bool {
        match self.stream.read(&mut [0; 100]) {
            Ok(len) => len == 0,
            // What it sent was not read to its end.
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// As QEMU does: its first pair is enabled before the features are there.
    fn negotiate(&mut self) {
        let features = self.ask(GET_FEATURES, &[]);
        for bit in [0, 1, 7, 8, 11, 12, 15, 16, 22, 29, 30, 32] {
            assert_ne!(features & 1 << bit, 0, "feature {bit} of {features:#x}");
        }
        let protocol = self.ask(GET_PROTOCOL_FEATURES, &[]);
        assert_eq!(protocol, 0b1001, "MQ and REPLY_ACK, no more");
        self.send(SET_PROTOCOL_FEATURES, 0, &protocol.to_ne_bytes(), &[]);
        assert_eq!(self.ask(GET_QUEUE_NUM, &[]), device::QUEUE_PAIRS_MAX as u64);
        self.send(SET_OWNER, 0, &[], &[]);
        for queue in [0, 1] {
            assert!(self.told(SET_VRING_ENABLE, &pair(queue, 1), &[]));
        }
        assert!(self.told(SET_FEATURES, &features.to_ne_bytes(), &[]));
    }

    fn set_up(&mut self, driver: &Driver) {
        self.negotiate();
        let mut table = Vec::from(1u64.to_ne_bytes());
        for word in [GUEST, MEMORY_BYTES, FRONT_END, 0] {
            table.extend(word.to_ne_bytes());
        }
        assert!(self.told(SET_MEM_TABLE, &table, &[driver.file.as_fd()]));
        for queue in [0, 1] {
            assert!(self.told(SET_VRING_NUM, &pair(queue, SIZE.into()), &[]));
            assert!(self.told(SET_VRING_BASE, &pair(queue, 0), &[]));
            let base = FRONT_END + u64::from(queue) * 0x4000;
            let mut addresses = pair(queue, 0);
            for address in [base, base + 0x2000, base + 0x1000, 0] {
                addresses.extend(address.to_ne_bytes());
            }
            assert!(self.told(SET_VRING_ADDR, &addresses, &[]));
            let which = u64::from(queue).to_ne_bytes();
            let ends = &driver.queues[queue as usize];
            assert!(self.told(SET_VRING_CALL, &which, &[ends.call.as_fd()]));
            assert!(self.told(SET_VRING_KICK, &which, &[ends.kick.as_fd()]));
        }
    }
}

fn pair(index: u32, value: u32) -> Vec<u8> {
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

#[test]
fn a_front_end_sets_up_goes_and_comes_again() {
    let mut listening = Listening::start("again");
    listening.until_sent(Err(DropReason::Unconnected));
    for _ in 0..2 {
        let mut client = listening.connect();
        // The memory and the rings of a driver whose own device is not used.
        let mut driver = Driver::start(terms());
        client.set_up(&driver);
        driver.chain(0, &[(BUFFERS, 1000)]);
        listening.until_sent(Ok(()));
        assert_eq!(driver.used(0), [(0, 72)]);
        driver.send(&PLAIN, &frame(60, 2));
        let mut batch = Batch::new();
        let counters = PortCounters::default();
        listening.port().rx.recv(&mut batch, &counters).unwrap();
        assert_eq!(batch.frames().next().unwrap().bytes, frame(60, 2));
        client.send(GET_VRING_BASE, 0, &pair(1, 0), &[]);
        assert_eq!(client.reply(), pair(1, 1));
        drop(client);
        listening.until_sent(Err(DropReason::Unconnected));
    }
}

#[test]
fn a_second_front_end_is_turned_away() {
    let mut listening = Listening::start("second");
    let mut first = listening.connect();
    first.ask(GET_FEATURES, &[]);
    let mut second = listening.connect();
    assert!(second.is_cut_off());
    let driver = Driver::start(terms());
    first.set_up(&driver);
    listening.until_sent(Ok(()));
}

#[test]
fn what_makes_no_sense_ends_the_connection_and_nothing_else() {
    let mut listening = Listening::start("nonsense");
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let file = memfd(0x1000);
    let table = |regions: u64, words: &[u64]| {
        let mut table = Vec::from(regions.to_ne_bytes());
        words
            .iter()
            .for_each(|word| table.extend(word.to_ne_bytes()));
        table
    };
    let good = [GUEST, 0x1000, FRONT_END, 0];
    let messages: Vec<(u32, Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        (0, vec![], vec![]),
        (99, vec![0; 8], vec![]),
        (SET_FEATURES, vec![0; 4], vec![]),
        (SET_FEATURES, u64::MAX.to_ne_bytes().to_vec(), vec![]),
        (
            SET_PROTOCOL_FEATURES,
            u64::MAX.to_ne_bytes().to_vec(),
            vec![],
        ),
        (SET_MEM_TABLE, table(1, &good), vec![]),
        (SET_MEM_TABLE, table(1, &good), vec![pipe.as_fd()]),
        (SET_MEM_TABLE, table(2, &good), vec![file.as_fd()]),
        (
            SET_MEM_TABLE,
            table(1, &[GUEST, 0x2000, FRONT_END, 0]),
            vec![file.as_fd()],
        ),
        (SET_VRING_NUM, pair(0, 3), vec![]),
        (SET_VRING_NUM, pair(16, 64), vec![]),
        (SET_VRING_ENABLE, pair(0, 2), vec![]),
        (SET_VRING_ENABLE, pair(u32::MAX, 1), vec![]),
        (SET_VRING_ADDR, [pair(0, 0), vec![0; 32]].concat(), vec![]),
        (
            SET_VRING_KICK,
            0u64.to_ne_bytes().to_vec(),
            vec![pipe.as_fd()],
        ),
        (
            SET_VRING_CALL,
            0u64.to_ne_bytes().to_vec(),
            vec![pipe.as_fd()],
        ),
        (SET_VRING_KICK, 0x100u64.to_ne_bytes().to_vec(), vec![]),
        (GET_VRING_BASE, pair(40, 0), vec![]),
    ];
    for (request, payload, fds) in messages {
        let mut client = listening.connect();
        client.ask(GET_FEATURES, &[]);
        client.send(request, 0, &payload, &fds);
        assert!(client.is_cut_off(), "message {request} {payload:?}");
    }
    let mut client = listening.connect();
    client.set_up(&Driver::start(terms()));
    listening.until_sent(Ok(()));
}

#[test]
fn a_port_ends_although_its_front_end_is_in_mid_sentence() {
    let mut listening = Listening::start("sentence");
    let client = listening.connect();
    rustix::io::write(&client.stream, &SET_FEATURES.to_ne_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let begun = Instant::now();
    drop(listening.port.take());
    assert!(begun.elapsed() < Duration::from_secs(5));
}

/// unix(7), net/unix/af_unix.c: shutting a listening socket down wakes who waits in accept.
#[test]
fn a_port_ends_although_its_socket_was_made_to_block() {
    let listener = UnixListener::bind(
        std::env::temp_dir().join(format!("lanlet-vhost-blocks-{}", std::process::id())),
    )
    .unwrap();
    let path = listener.local_addr().unwrap();
    let copy = listener.try_clone().unwrap();
    let waiting = std::thread::spawn(move || listener.accept().unwrap_err().raw_os_error());
    std::thread::sleep(Duration::from_millis(20));
    drop(open(copy.into(), false, "test".to_owned(), Arc::default()).unwrap());
    assert_eq!(waiting.join().unwrap(), Some(libc::EINVAL));
    std::fs::remove_file(path.as_pathname().unwrap()).unwrap();
}
