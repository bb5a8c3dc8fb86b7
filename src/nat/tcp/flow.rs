//! One flow: its two ends and the bytes between them.

use std::net::SocketAddr;

use super::engine::{Phase, SmolEngine, TcpEngine};
use super::syn::{Peer, SavedSyn};
use crate::frame::{Duration, Instant, PortId};
use crate::gateway::Outbox;
use crate::nat::{Io, SockId, Uplink};
use crate::sys::arena::{PAGE_BYTES, RX_RING_BYTES, TX_RING_BYTES};

/// RFC 5382 REQ-5: an established connection may idle for 2 hours 4 minutes.
pub const ESTABLISHED_IDLE: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
/// RFC 5382 REQ-5: a partially open or closing connection may idle for 4 minutes.
pub const TRANSITORY_IDLE: Duration = Duration::from_secs(4 * 60);
/// Bytes read from one host socket in one flush: four super-frames fit the L2 cache beside the rest,
/// and other flows get their turn.
pub const DOWN_BYTES_PER_FLUSH: usize = 512 * 1024;
/// Bytes of one read from a host socket.
const DOWN_READ_BYTES: usize = 256 * 1024;
/// Idle time after which a flow's empty rings are given back to the system.
pub const IDLE_RELEASE: Duration = Duration::from_secs(2);
/// How long the guest has to take what came before the host's connection broke. A kernel's peer has it
/// in its receive queue already; a guest that reads gets it within milliseconds.
const BROKEN_LINGER: Duration = Duration::from_secs(2);

/// Time between two times that what is in flight is sent again because it was too big: a link of the guest's
/// own is milliseconds away, and a guest that says of each size that it is too big gets ten flights a
/// second for it.
pub const SEND_AGAIN_INTERVAL: Duration = Duration::from_millis(100);

/// A guest's connection as its segments name it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    pub guest: SocketAddr,
    pub outside: SocketAddr,
}

/// Where a flow stands.
pub enum State {
    /// The host's connect is under way. May: be ended by a RST of the guest or by the connect's
    /// failure. Must not: hold ring memory or answer the guest. Moved on by `handle_ready`.
    Connecting(Box<SavedSyn>),
    /// The guest's end exists. Moved on by [`Flow::flush`]; the table drops the flow once the engine's
    /// phase is `Closed`.
    Open(Box<SmolEngine>),
}

/// One connection of a guest.
pub struct Flow {
    pub key: FlowKey,
    pub port: PortId,
    pub peer: Peer,
    pub host: SockId,
    pub state: State,
    /// The host socket may have something to read (edge-triggered: true until it says "blocked").
    pub host_readable: bool,
    pub host_writable: bool,
    /// A short receive may not have taken all: read on until the socket says "blocked" or ends.
    pub last_edge: bool,
    /// The guest chose where it goes, so the egress policy decided about it.
    pub is_judged: bool,
    /// The connection came from outside, through a forward.
    pub from_outside: bool,
    /// EOF was read from the host and passed on as FIN.
    pub host_finished: bool,
    /// The guest's FIN was passed on as SHUT_WR.
    pub guest_finished: bool,
    /// When the host's connection failed. What it sent before still goes to the guest, then a RST.
    pub broken_at: Option<Instant>,
    /// Counted in its port's busy flows: data is on its way to the guest.
    pub busy: bool,
    pub dirty: bool,
    /// Data moved since ring memory was last given back.
    pub touched: bool,
    /// What of the receive and the send ring data has gone over since then, bytes.
    pub walked: (usize, usize),
    /// Bytes that the host socket has taken; no more than fit are counted.
    pub sent: u32,
    /// What it takes was bounded, or needs no bound.
    pub is_unsent_bounded: bool,
    /// Ring memory that the flow is charged for.
    pub charged: usize,
    /// Its windows are bounded for lack of memory.
    pub is_short: bool,
    /// Its SYN went a few hops only, and its host socket still sends so.
    pub is_probe: bool,
    /// The guest sends keep-alives, so the host's socket does too.
    pub watched: bool,
    /// Segments got smaller, and what is in flight has not been sent again since.
    pub send_again_due: bool,
    /// When that may be.
    pub send_again_from: Instant,
    pub active_at: Instant,
    /// When the wheel will call for this flow.
    pub armed: Option<Instant>,
}

/// What a flush left of a flow.
pub enum Rest {
    /// Nothing more to do until something happens.
    Idle,
    /// Its share was used up: come back after the others.
    Backlog,
    /// It has ended and is to be removed.
    Ended,
}

impl Flow {
    /// A flow whose host socket has begun to connect, or (with an engine) one that came from outside
    /// and whose SYN to the guest is under way.
    pub fn new(
        key: FlowKey,
        port: PortId,
        peer: Peer,
        host: SockId,
        state: State,
        now: Instant,
    ) -> Self {
        let from_outside = matches!(state, State::Open(_));
        Self {
            key,
            port,
            peer,
            host,
            state,
            host_readable: from_outside,
            host_writable: from_outside,
            // What edges came before this flow had the socket nobody knows.
            last_edge: from_outside,
            is_judged: false,
            from_outside,
            host_finished: false,
            guest_finished: false,
            broken_at: None,
            busy: false,
            dirty: false,
            touched: false,
            walked: (0, 0),
            sent: 0,
            is_unsent_bounded: false,
            charged: 0,
            is_short: false,
            is_probe: false,
            watched: false,
            send_again_due: false,
            send_again_from: now,
            active_at: now,
            armed: None,
        }
    }

    /// Moves what can be moved both ways and lets the engine answer. At most `share` bytes are on
    /// their way to the guest afterwards, and `receive_max` wait for the host.
    pub fn flush<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        (share, receive_max): (usize, Option<usize>),
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) -> Rest {
        let State::Open(engine) = &mut self.state else {
            return Rest::Idle;
        };
        engine.set_receive_max(receive_max);

        // Guest to host. What a broken connection can't take is lost, as behind a kernel's socket.
        while engine.received() > 0 && (self.host_writable || self.broken_at.is_some()) {
            if self.broken_at.is_some() {
                engine.recv(|bytes| bytes.len());
                continue;
            }
            engine.recv(|bytes| match up.tcp_send(self.host, bytes) {
                Io::Done(sent) | Io::Drained(sent) => {
                    self.active_at = now;
                    self.sent = self.sent.saturating_add(sent as u32);
                    sent
                }
                Io::Blocked => {
                    self.host_writable = false;
                    0
                }
                Io::Eof | Io::Failed(_) => {
                    self.broken_at = Some(now);
                    0
                }
            });
        }
        if !self.guest_finished && self.broken_at.is_none() && engine.guest_finished() {
            self.guest_finished = true;
            // Where that was the last thing to happen, closing the socket says it as well.
            if !(self.host_finished && engine.phase() == Phase::Closed) {
                up.tcp_shutdown(self.host);
            }
        }

        // Host to guest.
        let mut budget = DOWN_BYTES_PER_FLUSH;
        loop {
            let room = engine
                .room()
                .min(share.saturating_sub(engine.unacknowledged()))
                .min(DOWN_READ_BYTES);
            if !self.host_readable || self.host_finished || room == 0 || budget == 0 {
                break;
            }
            let mut received = 0;
            engine.send(room, |room| {
                match up.tcp_recv(self.host, room) {
                    Io::Done(bytes) => received = bytes,
                    Io::Drained(bytes) => {
                        received = bytes;
                        self.host_readable = self.last_edge;
                    }
                    Io::Blocked => self.host_readable = false,
                    Io::Eof if self.broken_at.is_none() => {
                        // A sign of life: the guest has the closing timer's time from here on.
                        self.active_at = now;
                        self.host_finished = true;
                    }
                    Io::Eof | Io::Failed(_) => {
                        self.broken_at.get_or_insert(now);
                        self.host_readable = false;
                    }
                }
                received
            });
            if received > 0 {
                budget = budget.saturating_sub(received);
                self.walked.1 += received;
                self.active_at = now;
                self.touched = true;
            }
            engine.poll_egress(now, &self.peer, out);
        }
        match self.broken_at {
            Some(at) => {
                let drained = !self.host_readable || self.host_finished;
                if (drained && engine.unacknowledged() == 0) || now >= at + BROKEN_LINGER {
                    engine.abort();
                }
            }
            None if self.host_finished => engine.close(),
            None => {}
        }
        engine.poll_egress(now, &self.peer, out);
        engine.announce(now, &self.peer, out);

        self.busy = engine.unacknowledged() > 0;
        match engine.phase() {
            Phase::Closed => {
                // The ACK of our FIN and the guest's FIN may come in one segment.
                self.guest_finished |= self.broken_at.is_none() && engine.guest_finished();
                Rest::Ended
            }
            _ if budget == 0 => Rest::Backlog,
            _ => Rest::Idle,
        }
    }

    /// Gives back the pages of the rings that no data is in.
    pub fn release_memory(&mut self) {
        if let State::Open(engine) = &mut self.state {
            let (receive, send) = engine.release_memory();
            self.walked.0 = receive.unwrap_or(self.walked.0);
            self.walked.1 = send.unwrap_or(self.walked.1);
            self.touched = self.walked != (0, 0);
        }
    }

    /// The ring memory that data has gone over, in pages: it may begin and end within one.
    pub fn memory(&self) -> usize {
        let pages = |bytes: usize, ring: usize| match bytes {
            0 => 0,
            bytes => (bytes.next_multiple_of(PAGE_BYTES) + PAGE_BYTES).min(ring),
        };
        pages(self.walked.0, RX_RING_BYTES) + pages(self.walked.1, TX_RING_BYTES)
    }

    /// What of [`Flow::memory`] no data waits in.
    pub fn unused_memory(&self) -> usize {
        let State::Open(engine) = &self.state else {
            return 0;
        };
        let held = engine.received() + engine.unacknowledged();
        self.memory().saturating_sub(held)
    }

    /// Sends what is in flight again, in segments of the size that it has now.
    pub fn send_again<O: Outbox + ?Sized>(&mut self, now: Instant, out: &mut O) {
        self.send_again_due = false;
        self.send_again_from = now + SEND_AGAIN_INTERVAL;
        if let State::Open(engine) = &mut self.state {
            engine.send_again(now, &self.peer, out);
        }
    }

    /// Whether the host's connect is under way.
    pub fn is_connecting(&self) -> bool {
        matches!(self.state, State::Connecting(_))
    }

    /// How long the flow may idle in its state (RFC 5382 REQ-5).
    pub fn idle_limit(&self) -> Duration {
        match &self.state {
            State::Open(engine)
                if engine.phase() == Phase::Open && !self.host_finished && !self.guest_finished =>
            {
                ESTABLISHED_IDLE
            }
            _ => TRANSITORY_IDLE,
        }
    }

    /// When the flow next wants to be flushed without an event.
    pub fn poll_timeout(&mut self, now: Instant) -> Instant {
        let mut next = self.active_at + self.idle_limit();
        if let Some(at) = self.broken_at {
            next = next.min(at + BROKEN_LINGER);
        }
        if self.send_again_due {
            next = next.min(self.send_again_from);
        }
        if self.touched {
            next = next.min(self.active_at + IDLE_RELEASE);
        }
        if let State::Open(engine) = &mut self.state
            && let Some(due) = engine.poll_timeout(now)
        {
            // "At once" can't be meant: egress was just polled dry. The next tick it is.
            next = next.min(due.max(now));
        }
        next
    }
}
