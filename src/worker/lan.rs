//! The switch and the send halves of its ports: where a worker's frames go.

use std::sync::Arc;

use super::refused;
use crate::frame::{ETH_HEADER_LEN, FRAME_BUFFER_LEN, Frame, Mac, PortId};
use crate::gateway::Outbox;
use crate::offload::{self, Caps, Offload};
use crate::port::vhost_user::RemoteFrame;
use crate::port::{PortTx, Shortcut};
use crate::stats::{DropReason, PortCounters};
use crate::switch::{Switch, Verdict};

/// Bytes of IP packet that a port takes. Taps pass anything; what a guest's MTU is, is between the
/// guests, as on the kernel's bridge.
const PORT_MTU: usize = 65_535;
/// What the gateway takes undone: its sockets do the rest.
const GATEWAY_CAPS: Caps = Caps {
    csum: true,
    tso: true,
    uso: true,
};

/// The switch and the send halves.
pub(super) struct Lan {
    pub(super) switch: Arc<Switch>,
    /// By port number; the gateway's place stays empty.
    ports: Vec<Option<Egress>>,
    /// Counters of the gateway's port: received is what the gateway sends into the switch.
    pub(super) gateway: Arc<PortCounters>,
    scratch: Box<[u8]>,
    /// Ports whose batch is to be ended.
    unflushed: Vec<usize>,
}

struct Egress {
    id: PortId,
    tx: Arc<dyn PortTx>,
    counters: Arc<PortCounters>,
    is_batched: bool,
    /// It is among [`Lan::unflushed`].
    is_unflushed: bool,
}

impl Lan {
    /// A switch without ports but the gateway's, which these are the counters of.
    pub(super) fn new(switch: Arc<Switch>, gateway: Arc<PortCounters>) -> Self {
        Self {
            switch,
            ports: vec![None],
            gateway,
            scratch: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
            unflushed: Vec::new(),
        }
    }

    /// Sends to a port from here on.
    pub(super) fn add_port(
        &mut self,
        id: PortId,
        tx: Arc<dyn PortTx>,
        counters: Arc<PortCounters>,
    ) {
        let index = usize::from(id.0);
        if self.ports.len() <= index {
            self.ports.resize_with(index + 1, || None);
        }
        self.ports[index] = Some(Egress {
            id,
            is_batched: tx.is_batched(),
            is_unflushed: false,
            tx,
            counters,
        });
    }

    /// Sends to a port no more; whether it was there.
    pub(super) fn remove_port(&mut self, id: PortId) -> bool {
        let port = self.ports.get_mut(usize::from(id.0));
        let was_there = port.and_then(Option::take).is_some();
        if was_there {
            self.switch.remove_port(id);
        }
        was_there
    }

    /// Whether there is no port but the gateway's.
    pub(super) fn is_empty(&self) -> bool {
        self.ports.iter().all(Option::is_none)
    }

    /// The counters of a port, if it is there.
    pub(super) fn counters(&self, id: PortId) -> Option<&Arc<PortCounters>> {
        let port = self.ports.get(usize::from(id.0))?.as_ref();
        port.map(|egress| &egress.counters)
    }

    /// Whether `id` is the port with these counters still.
    pub(super) fn is_port(&self, id: PortId, counters: &Arc<PortCounters>) -> bool {
        self.counters(id)
            .is_some_and(|own| Arc::ptr_eq(own, counters))
    }

    /// Open files that the ports may take later.
    pub(super) fn files_to_come(&self) -> usize {
        let ports = self.ports.iter().flatten();
        ports.map(|egress| egress.tx.files_to_come()).sum()
    }

    /// What the receiver of a frame takes undone; nothing if there are several, or none is known.
    pub(super) fn takes(&self, frame: &Frame<'_>) -> Caps {
        match self.switch.find(frame.destination()) {
            Some(PortId::GATEWAY) => GATEWAY_CAPS,
            Some(port) => match self.ports.get(usize::from(port.0)) {
                Some(Some(egress)) => egress.tx.caps(),
                _ => Caps::default(),
            },
            None => Caps::default(),
        }
    }

    /// Decides about a frame and sends it to the ports it is for. Returns whether the gateway is
    /// among its receivers.
    pub(super) fn forward(
        &mut self,
        ingress: PortId,
        frame: Frame<'_>,
    ) -> Result<bool, DropReason> {
        debug_assert!(frame.bytes.len() >= ETH_HEADER_LEN);
        match self.switch.decide(ingress, frame.bytes) {
            Verdict::Unicast(PortId::GATEWAY) => Ok(true),
            Verdict::Unicast(port) => {
                let index = usize::from(port.0);
                if let Some(Some(egress)) = self.ports.get_mut(index) {
                    egress.send(frame, &mut self.scratch);
                    egress.note_unflushed(index, &mut self.unflushed);
                    Ok(false)
                } else {
                    Err(DropReason::NoPort)
                }
            }
            Verdict::Flood { to_gateway } => {
                let mut receivers = usize::from(to_gateway);
                for (index, egress) in self.ports.iter_mut().enumerate() {
                    if let Some(egress) =
                        egress.as_mut().filter(|_| index != usize::from(ingress.0))
                    {
                        receivers += 1;
                        if !egress.tx.is_up() {
                            continue;
                        }
                        egress.send(frame, &mut self.scratch);
                        egress.note_unflushed(index, &mut self.unflushed);
                    }
                }
                if receivers == 0 {
                    Err(DropReason::NoPort)
                } else {
                    Ok(to_gateway)
                }
            }
            Verdict::Drop(reason) => Err(reason),
        }
    }

    /// Ends the batches of the ports that were sent to.
    pub(super) fn flush(&mut self) {
        for index in self.unflushed.drain(..) {
            // The port may have gone meanwhile.
            if let Some(Some(egress)) = self.ports.get_mut(index) {
                egress.is_unflushed = false;
                egress.tx.flush();
            }
        }
    }
}

/// From one guest's memory to another's.
pub(super) struct LanShortcut<'a> {
    pub(super) lan: &'a mut Lan,
    pub(super) ingress: PortId,
}

impl Shortcut for LanShortcut<'_> {
    fn leads(&self, head: &[u8]) -> bool {
        let port = self.lan.switch.find(Mac::at(head, 0));
        let port = port.filter(|&port| port != self.ingress);
        let egress = port.and_then(|port| self.lan.ports.get(usize::from(port.0)));
        matches!(egress, Some(Some(egress)) if egress.is_batched)
    }

    fn send(&mut self, frame: &RemoteFrame<'_>) -> bool {
        // What is not for one port is decided about once more, on its way through the batch: with the
        // same outcome, as nothing comes between.
        let verdict = self.lan.switch.decide(self.ingress, frame.head.bytes);
        let Verdict::Unicast(port) = verdict else {
            return false;
        };
        let index = usize::from(port.0);
        let Some(Some(egress)) = self.lan.ports.get_mut(index) else {
            return false;
        };
        if !egress.tx.caps().take(frame.head.offload) {
            return false;
        }
        match egress.tx.send_remote(frame) {
            None => return false,
            Some(Ok(())) => egress.counters.tx(frame.frame_len()),
            Some(Err(reason)) => egress.counters.count_drop(reason),
        }
        egress.note_unflushed(index, &mut self.lan.unflushed);
        true
    }
}

impl Egress {
    /// Sends a frame as this port needs it; losses are counted here.
    fn send(&self, frame: Frame<'_>, scratch: &mut [u8]) {
        let refuse = |reason, frame: Frame<'_>| {
            self.counters.count_drop(reason);
            refused::trace(self.id, reason, frame);
        };
        let mut send = |frame: Frame<'_>| match self.tx.send(frame) {
            Ok(()) => self.counters.tx(frame.bytes.len()),
            Err(reason) => refuse(reason, frame),
        };
        if let Err(reason) = offload::fit(frame, self.tx.caps(), PORT_MTU, scratch, &mut send) {
            refuse(reason, frame);
        }
    }

    /// Remembers that this port's batch is to be ended.
    fn note_unflushed(&mut self, index: usize, unflushed: &mut Vec<usize>) {
        if self.is_batched && !self.is_unflushed {
            self.is_unflushed = true;
            unflushed.push(index);
        }
    }
}

/// Frames of the gateway enter the switch here, by its own port.
pub(super) struct GatewayOut<'a> {
    pub(super) lan: &'a mut Lan,
    pub(super) buffer: &'a mut [u8],
}

impl Outbox for GatewayOut<'_> {
    fn buffer(&mut self) -> &mut [u8] {
        self.buffer
    }

    fn send(&mut self, len: usize, offload: Offload) {
        let frame = Frame {
            bytes: &self.buffer[..len],
            offload,
        };
        self.lan.gateway.rx(len);
        if let Err(reason) = self.lan.forward(PortId::GATEWAY, frame) {
            self.lan.gateway.count_drop(reason);
            refused::trace(PortId::GATEWAY, reason, frame);
        }
    }
}
