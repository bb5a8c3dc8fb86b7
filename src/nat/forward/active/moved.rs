//! A forward on its way from one worker to another, with what waits for its guest.

use std::collections::VecDeque;
use std::net::SocketAddr;

use hashbrown::HashMap;

use super::super::ForwardId;
use super::super::directory::Memory;
use super::datagrams::Waiting;
use super::{ActiveForwards, HELD_MAX, Listener, ListenerKind, Own, Parked};
use crate::frame::{Instant, WorkerId};
use crate::gateway::Outbox;
use crate::nat::tcp::TcpNat;
use crate::nat::{HostError, SockId, SockOwner, Uplink};

/// A forward's sockets, `S` each, and what came in by them.
#[derive(Debug)]
pub struct Moved<S> {
    /// Which forward.
    pub forward: ForwardId,
    /// Who has its guest's name.
    pub(super) memory: Memory,
    pub(super) listeners: Vec<MovedListener<S>>,
    pub(super) parked: Vec<MovedParked<S>>,
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct MovedListener<S> {
    pub socket: S,
    pub kind: ListenerKind,
    pub guest_port: u16,
    pub held: Vec<Waiting>,
}

/// A connection that waits for its guest.
#[derive(Debug)]
pub(super) struct MovedParked<S> {
    pub socket: S,
    pub client: Option<SocketAddr>,
    pub guest_port: u16,
    /// When it is given up.
    pub until: Instant,
}

impl<S> Moved<S> {
    /// With other sockets in place of these; those that there are none for stay behind.
    pub fn exchange<T>(self, mut exchange: impl FnMut(S) -> Option<T>) -> Moved<T> {
        let listeners = self.listeners.into_iter().filter_map(|listener| {
            Some(MovedListener {
                socket: exchange(listener.socket)?,
                kind: listener.kind,
                guest_port: listener.guest_port,
                held: listener.held,
            })
        });
        let listeners = listeners.collect();
        let parked = self.parked.into_iter().filter_map(|parked| {
            Some(MovedParked {
                socket: exchange(parked.socket)?,
                client: parked.client,
                guest_port: parked.guest_port,
                until: parked.until,
            })
        });
        Moved {
            forward: self.forward,
            memory: self.memory,
            listeners,
            parked: parked.collect(),
        }
    }
}

impl ActiveForwards {
    /// A forward whose guest is with another worker, with all that has to go there. UDP sessions end:
    /// their guest was here.
    pub fn poll_leaving(&mut self) -> Option<(WorkerId, Moved<SockId>)> {
        let (id, to, active) = loop {
            let (id, to) = self.leaving.pop_first()?;
            // One that was removed meanwhile goes nowhere.
            if let Some(active) = self.forwards.get_mut(&id) {
                break (id, to, active);
            }
        };
        let sockets = std::mem::take(&mut active.sockets);
        let mut moved = Moved {
            forward: id,
            memory: std::mem::take(&mut active.memory),
            listeners: Vec::with_capacity(sockets.len()),
            parked: Vec::new(),
        };
        for own in sockets {
            let Some(Own::Listener(listener)) = self.own.remove(own) else {
                continue;
            };
            let (held, kept): (VecDeque<_>, _) = std::mem::take(&mut self.held)
                .into_iter()
                .partition(|waiting| waiting.listener == own);
            self.held = kept;
            moved.listeners.push(MovedListener {
                socket: listener.socket,
                kind: listener.kind,
                guest_port: listener.guest_port,
                held: held.into(),
            });
        }
        let queued: HashMap<_, _> = self.parked.iter().map(|&(until, at)| (at, until)).collect();
        for own in self.parked_of(id) {
            let until = queued.get(&own).copied();
            let (Some(parked), Some(until)) = (self.unpark(own), until) else {
                continue;
            };
            moved.parked.push(MovedParked {
                socket: parked.socket,
                client: parked.client,
                guest_port: parked.guest_port,
                until,
            });
        }
        self.sessions.remove_forward(id);
        Some((to, moved))
    }

    /// Takes over a forward from another worker; `open` registers a socket. Where the forward was
    /// removed meanwhile nothing is opened.
    pub fn arrive<S, U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        moved: Moved<S>,
        tcp: &mut TcpNat,
        now: Instant,
        (up, out): (&mut U, &mut O),
        mut open: impl FnMut(&mut U, S, Option<ListenerKind>, SockOwner) -> Result<SockId, HostError>,
    ) {
        let forward = moved.forward;
        let Some(active) = self.forwards.get_mut(&forward) else {
            return;
        };
        active.memory = moved.memory;
        for listener in moved.listeners {
            let (kind, guest_port) = (listener.kind, listener.guest_port);
            let opened = self.own.insert_with(HostError::Exhausted, |own| {
                let owner = SockOwner::Forward(own);
                let socket = open(up, listener.socket, Some(kind), owner)?;
                Ok(Own::Listener(Listener {
                    forward,
                    socket,
                    kind,
                    guest_port,
                }))
            });
            match opened {
                Ok(own) => {
                    active.sockets.push(own);
                    let room = HELD_MAX.saturating_sub(self.held.len());
                    active.counters.refused += listener.held.len().saturating_sub(room) as u64;
                    let held = listener.held.into_iter();
                    let held = held.map(|waiting| Waiting {
                        listener: own,
                        ..waiting
                    });
                    self.held.extend(held.take(room));
                }
                Err(error) => log::error!("forward {forward}: a socket of it is lost: {error:?}"),
            }
        }
        for parked in moved.parked {
            if self.is_full(forward) {
                // Its socket closes: the client hears of it.
                if let Some(active) = self.forwards.get_mut(&forward) {
                    active.counters.refused += 1;
                }
                continue;
            }
            let opened = self.own.insert_with(HostError::Exhausted, |own| {
                Ok(Own::Parked(Parked {
                    forward,
                    socket: open(up, parked.socket, None, SockOwner::Forward(own))?,
                    client: parked.client,
                    guest_port: parked.guest_port,
                    queued: false,
                }))
            });
            if let Ok(own) = opened {
                self.park(own, parked.until, now, &mut *up);
                self.move_on(own, tcp, now, (&mut *up, &mut *out));
            }
        }
        if !self.held.is_empty() {
            self.try_again(tcp, now, (up, out));
        }
    }
}
