//! The XenBus state machine of one backend device, as a pure function.
//!
//! ```text
//!   1 Initialising ─announce─▶ 2 InitWait ─(frontend 3 or 4, disk ready)─▶ connect … connected ─publish─▶ 4 Connected
//!        ▲ made by the toolstack    ▲                                                                        │ frontend 5, 6, 1, gone;
//!                                   └── frontend 1, 3, 4 and online ── 6 Closed ◀─ drained, frontend done ── 5 Closing ◀┘ or toolstack
//! ```
//! [`step`] is given what is in XenStore *now* ([`View`]), how far the shard is ([`Link`]) and what just happened ([`Event`]). It never
//! relies on having seen a change: watches coalesce, and frontends jump, flap, vanish and lie. Whoever executes a step writes the state
//! only if our state is still the one in the view.
//!
//! Invariants, all enumerated in the tests: connect only with nothing connected, connecting or draining; Closed is written only when
//! nothing is mapped, and never straight after Connected; nothing is written into a directory that is gone; only a device that we made
//! ourselves is removed by us; with a frontend that stays as it is, the machine comes to rest.
//! Source of the rules: `xen/include/public/io/xenbus.h`, `blkif.h`, and what libxl, Linux's drivers and QEMU do with them.

/// A state, as both ends write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum XenbusState {
    /// None, or not a state.
    Unknown = 0,
    /// The toolstack made the device; or a frontend starts again.
    Initialising = 1,
    /// The backend told what it can do.
    InitWait = 2,
    /// The frontend told where its rings are.
    Initialised = 3,
    /// Requests may flow.
    Connected = 4,
    /// Being closed.
    Closing = 5,
    /// Closed.
    Closed = 6,
    /// Not used by disks.
    Reconfiguring = 7,
    /// Not used by disks.
    Reconfigured = 8,
}

impl XenbusState {
    /// All, in order.
    pub const ALL: [XenbusState; 9] = [
        XenbusState::Unknown,
        XenbusState::Initialising,
        XenbusState::InitWait,
        XenbusState::Initialised,
        XenbusState::Connected,
        XenbusState::Closing,
        XenbusState::Closed,
        XenbusState::Reconfiguring,
        XenbusState::Reconfigured,
    ];

    /// The state of a node's value; [`XenbusState::Unknown`] for what is none.
    pub fn parse(value: &[u8]) -> XenbusState {
        match value {
            [digit @ b'0'..=b'8'] => XenbusState::ALL[usize::from(digit - b'0')],
            _ => XenbusState::Unknown,
        }
    }

    /// As it is written.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// How far the shard is with this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Link {
    /// It has nothing of it.
    Idle,
    /// Found connected when the daemon started: the rings belong to a daemon that is dead. Nothing is mapped, and nobody answers the
    /// guest's requests until its frontend starts again.
    Awaiting,
    /// It was told to connect.
    Connecting,
    /// It was told to connect and shall disconnect as soon as it has.
    Abandoning,
    /// It serves the rings.
    Connected,
    /// It was told to disconnect.
    Draining,
}

/// How the disk behind the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskIs {
    /// Being opened, or not yet asked for.
    Pending,
    /// Ready to serve.
    Ready,
    /// It could not be opened.
    Failed,
}

/// What is so now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct View {
    /// Our state; none when the backend directory is gone. Unknown when the directory has no state.
    pub own: Option<XenbusState>,
    /// The frontend's state; none when it is missing, 0 or rubbish, or when the domain is dead.
    pub front: Option<XenbusState>,
    /// False when the device is being removed, or its domain is dead.
    pub online: bool,
    /// The disk.
    pub disk: DiskIs,
    /// We made the device, and not a toolstack.
    pub ours: bool,
    /// Our features were published since the daemon started, or since the device was made.
    pub announced: bool,
}

/// What just happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Something may have changed in XenStore, or the disk.
    Look,
    /// The shard serves the rings.
    Connected,
    /// The shard could not map or bind them, or the frontend's nodes are wrong.
    ConnectFailed,
    /// The shard has let go of everything.
    Drained,
    /// The shard stopped a ring whose producer index is impossible.
    RingBroken,
    /// The disk has another size.
    Resized,
}

/// Why a device fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// See [`Event::ConnectFailed`].
    Connect,
    /// See [`DiskIs::Failed`].
    Disk,
}

/// What to do, besides writing the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Publish features, with the state InitWait.
    Announce,
    /// Read and check the frontend's nodes, and tell the shard to connect.
    Connect,
    /// Tell the shard to finish what it has and let go.
    Disconnect,
    /// Publish the disk's properties, with the state Connected.
    Publish,
    /// Publish the disk's size, with the state Connected, which frontends take for a notice.
    PublishSize,
    /// Tell why the device fails.
    Fail(Why),
    /// Tell that a ring was stopped. Other rings, and the state, stay.
    ReportBroken,
    /// Remove both ends from XenStore.
    Remove,
    /// Give the disk up and forget the device.
    Free,
}

/// The outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// How far the shard is from now on.
    pub link: Link,
    /// The state to write, if our state is still that of the view.
    pub write: Option<XenbusState>,
    /// To be done: those that publish go with the state in one transaction, before the others.
    pub actions: Vec<Action>,
}

impl Step {
    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn with(&mut self, action: Action, state: XenbusState) {
        self.actions.push(action);
        self.write = Some(state);
    }
}

/// What to do about an event.
pub fn step(link: Link, view: View, event: Event) -> Step {
    use XenbusState::*;
    let mut step = Step { link, write: None, actions: Vec::new() };
    let (mut just_connected, mut failed) = (false, false);
    match (event, link) {
        (Event::Connected, Link::Connecting) => {
            step.link = Link::Connected;
            just_connected = true;
        }
        (Event::Connected, Link::Abandoning) => {
            step.link = Link::Draining;
            step.act(Action::Disconnect);
        }
        (Event::ConnectFailed, Link::Connecting) => {
            step.link = Link::Idle;
            failed = true;
        }
        (Event::ConnectFailed, Link::Abandoning) | (Event::Drained, Link::Draining) => step.link = Link::Idle,
        (Event::RingBroken, Link::Connected) => step.act(Action::ReportBroken),
        _ => {}
    }
    leave(&mut step, &view);
    let Some(own) = view.own else {
        if step.link == Link::Idle {
            step.act(Action::Free);
        }
        return step;
    };
    match own {
        // A directory without a state is not finished: its maker is told nothing.
        Unknown => {}
        Initialising => waiting(&mut step, &view, false, false),
        // The three others are no states of a backend: somebody else wrote them, and InitWait follows.
        InitWait | Initialised | Reconfiguring | Reconfigured => {
            waiting(&mut step, &view, own == InitWait, failed);
        }
        Connected => connected(&mut step, &view, event, just_connected),
        // Rings that are in use are waited for; the frontend does it, or the toolstack takes the directory away.
        Closing => {
            if step.link == Link::Idle && matches!(view.front, None | Some(Closed | Initialising)) {
                step.write = Some(Closed);
            }
        }
        Closed => closed(&mut step, &view),
    }
    step
}

/// Lets go of rings that nobody uses any more.
fn leave(step: &mut Step, view: &View) {
    use XenbusState::*;
    // A frontend in state 1 has started again and forgotten its rings; a directory in state 1 was made again.
    let gone = matches!(view.front, None | Some(Closed | Initialising))
        || matches!(view.own, None | Some(Closed | Initialising));
    match step.link {
        Link::Connected if gone => {
            step.link = Link::Draining;
            step.act(Action::Disconnect);
        }
        // The guest has not been told that it is connected: nothing of it is in flight.
        Link::Connecting if gone || view.front == Some(Closing) || view.own == Some(Closing) => {
            step.link = Link::Abandoning;
        }
        Link::Awaiting if gone || matches!(view.own, Some(InitWait | Initialised)) => step.link = Link::Idle,
        _ => {}
    }
}

/// Our state is 1, or (`told`) 2: not connected yet.
fn waiting(step: &mut Step, view: &View, told: bool, failed: bool) {
    use XenbusState::*;
    match view.front {
        None | Some(Closed) => {
            if step.link == Link::Idle {
                step.write = Some(Closed);
            }
        }
        // A frontend that sees Closed before Closing blocks the guest's shutdown for seconds.
        Some(Closing) => step.write = Some(Closing),
        Some(front) => {
            let has_rings = matches!(front, Initialised | Connected);
            match step.link {
                Link::Connected if has_rings => step.with(Action::Publish, Connected),
                Link::Idle if failed && has_rings => step.with(Action::Fail(Why::Connect), Closing),
                Link::Idle if view.disk == DiskIs::Failed => step.with(Action::Fail(Why::Disk), Closing),
                Link::Idle if !view.online => {}
                // The toolstack waits for this state before it runs the script, so the disk need not be ready.
                Link::Idle if !told || !view.announced => step.with(Action::Announce, InitWait),
                Link::Idle if has_rings && view.disk == DiskIs::Ready => {
                    step.link = Link::Connecting;
                    step.act(Action::Connect);
                }
                _ => {}
            }
        }
    }
}

/// Our state is 4.
fn connected(step: &mut Step, view: &View, event: Event, just_connected: bool) {
    use XenbusState::*;
    let in_use = matches!(view.front, Some(Initialised | Connected));
    match step.link {
        Link::Connected if view.front == Some(Closing) => step.write = Some(Closing),
        // Somebody wrote our state for us.
        Link::Connected if just_connected && in_use => step.with(Action::Publish, Connected),
        Link::Connected if event == Event::Resized && in_use => step.with(Action::PublishSize, Connected),
        Link::Awaiting if view.front == Some(Closing) => step.write = Some(Closing),
        // Closing comes before Closed, also when the frontend did not say so.
        Link::Draining | Link::Idle | Link::Abandoning => step.write = Some(Closing),
        Link::Connected | Link::Awaiting | Link::Connecting => {}
    }
}

/// Our state is 6.
fn closed(step: &mut Step, view: &View) {
    use XenbusState::*;
    if step.link != Link::Idle {
        return;
    }
    if !view.online {
        if view.ours {
            step.act(Action::Remove);
        }
        return;
    }
    // A driver that was loaded again, a kernel started by a boot loader or by kexec; some go straight to 3.
    if matches!(view.front, Some(Initialising | Initialised | Connected)) && view.disk != DiskIs::Failed {
        step.with(Action::Announce, InitWait);
    }
}

#[cfg(test)]
#[path = "xenbus_tests.rs"]
mod tests;
