//! Goal: the machine keeps its promises whatever both ends of XenStore contain and whatever the shard reports, and works with
//! frontends that are as they should be.
//! Method: (1) every combination of inputs, each checked against the rules; (2) from every combination, the loop closed with a shard
//! that answers, until it rests; (3) long random walks of a model world with honest and dishonest frontends, a toolstack, and views
//! that are stale by the time they are acted on.

use std::collections::BTreeSet;

use super::*;

const LINKS: [Link; 6] =
    [Link::Idle, Link::Awaiting, Link::Connecting, Link::Abandoning, Link::Connected, Link::Draining];
const DISKS: [DiskIs; 3] = [DiskIs::Pending, DiskIs::Ready, DiskIs::Failed];
const EVENTS: [Event; 6] =
    [Event::Look, Event::Connected, Event::ConnectFailed, Event::Drained, Event::RingBroken, Event::Resized];
use XenbusState::*;

/// 10 own x 9 front x 2 online x 3 disks x 2 makers x 2 announced x 6 links.
fn all_views() -> Vec<(Link, View)> {
    let owns = std::iter::once(None).chain(XenbusState::ALL.map(Some));
    let fronts: Vec<_> =
        std::iter::once(None).chain(XenbusState::ALL[1..].iter().copied().map(Some)).collect();
    let mut all = Vec::new();
    for own in owns {
        for &front in &fronts {
            for disk in DISKS {
                for bits in 0..8 {
                    for link in LINKS {
                        let (online, ours, announced) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
                        all.push((link, View { own, front, online, disk, ours, announced }));
                    }
                }
            }
        }
    }
    all
}

fn has_rings(front: Option<XenbusState>) -> bool {
    matches!(front, Some(Initialised | Connected))
}

fn done(front: Option<XenbusState>) -> bool {
    matches!(front, None | Some(Closed))
}

/// The rules that hold for each single step.
fn check(link: Link, view: View, event: Event) -> Step {
    let out = step(link, view, event);
    let shown = format!("{link:?} {view:?} {event:?} -> {out:?}");
    let does = |action| out.actions.contains(&action);
    let unique: BTreeSet<String> = out.actions.iter().map(|action| format!("{action:?}")).collect();
    assert_eq!(unique.len(), out.actions.len(), "{shown}");
    assert_eq!(out, step(link, view, event), "a function");
    // Never connects twice, and only what is there to be connected.
    if does(Action::Connect) {
        let free = link == Link::Idle
            || (link, event) == (Link::Draining, Event::Drained)
            || (link, event) == (Link::Abandoning, Event::ConnectFailed)
            || (link == Link::Awaiting && view.own != Some(Connected));
        assert!(free && out.link == Link::Connecting, "{shown}");
        assert!(
            has_rings(view.front) && view.online && view.disk == DiskIs::Ready && view.announced,
            "{shown}"
        );
        assert!(!does(Action::Disconnect) && out.write.is_none(), "{shown}");
    }
    assert_eq!(out.link == Link::Connecting && link != Link::Connecting, does(Action::Connect), "{shown}");
    // Disconnect is said once to what is connected, and to nothing else.
    let was_connected = link == Link::Connected
        || (event == Event::Connected && matches!(link, Link::Connecting | Link::Abandoning));
    assert_eq!(does(Action::Disconnect), out.link == Link::Draining && link != Link::Draining, "{shown}");
    assert!(!does(Action::Disconnect) || was_connected, "{shown}");
    assert!(
        !was_connected || matches!(out.link, Link::Connected | Link::Draining | Link::Abandoning),
        "{shown}"
    );
    // A connection that is under way is answered before it is forgotten.
    if matches!(link, Link::Connecting | Link::Abandoning)
        && !matches!(event, Event::Connected | Event::ConnectFailed)
    {
        assert!(matches!(out.link, Link::Connecting | Link::Abandoning), "{shown}");
    }
    if link == Link::Draining && event != Event::Drained {
        assert_eq!(out.link, Link::Draining, "{shown}");
    }
    match out.write {
        None => assert!(
            !does(Action::Announce) && !does(Action::Publish) && !does(Action::PublishSize),
            "what is published goes with a state: {shown}"
        ),
        Some(InitWait) => {
            assert!(does(Action::Announce) && view.online && out.link == Link::Idle, "{shown}");
            assert!(view.disk != DiskIs::Failed && !done(view.front), "{shown}");
        }
        Some(Connected) => {
            assert!(out.link == Link::Connected && has_rings(view.front), "{shown}");
            assert!(does(Action::Publish) ^ does(Action::PublishSize), "{shown}");
            assert!(!does(Action::PublishSize) || view.own == Some(Connected), "{shown}");
            assert!(!matches!(view.own, Some(Closing | Closed | Unknown)), "{shown}");
        }
        Some(Closing) => assert!(!matches!(view.own, Some(Closing | Closed | Unknown)), "{shown}"),
        Some(Closed) => {
            assert_eq!(out.link, Link::Idle, "Closed while something is mapped: {shown}");
            assert_ne!(view.own, Some(Connected), "5 before 6: {shown}");
            assert!(done(view.front) || view.front == Some(Initialising), "{shown}");
        }
        Some(other) => panic!("{other:?} is not a state of ours: {shown}"),
    }
    // A directory that is gone stays gone, and the device is forgotten once nothing is mapped.
    if view.own.is_none() {
        assert_eq!(out.write, None, "{shown}");
        assert!(!does(Action::Remove) && !does(Action::Connect), "{shown}");
    }
    assert_eq!(does(Action::Free), view.own.is_none() && out.link == Link::Idle, "{shown}");
    // Only what we made is removed by us, closed, and after everything was let go.
    if does(Action::Remove) {
        assert!(view.ours && !view.online && view.own == Some(Closed) && out.link == Link::Idle, "{shown}");
    }
    // A broken ring is told of; nothing else comes of it.
    if event == Event::RingBroken {
        let look = step(link, view, Event::Look);
        let rest: Vec<_> =
            out.actions.iter().copied().filter(|action| *action != Action::ReportBroken).collect();
        assert_eq!((out.link, out.write, rest), (look.link, look.write, look.actions), "{shown}");
        assert_eq!(does(Action::ReportBroken), link == Link::Connected, "{shown}");
    }
    // The rings of a dead daemon are left alone while the guest keeps them.
    if link == Link::Awaiting && matches!(view.own, Some(Connected | Closing)) && has_rings(view.front) {
        assert_eq!((out.link, out.write, out.actions.len()), (Link::Awaiting, None, 0), "{shown}");
    }
    // Facts of the protocol, one by one.
    if event == Event::Look && view.front == Some(Closing) && matches!(view.own, Some(InitWait | Connected)) {
        let waits = view.own == Some(Connected) && link == Link::Connecting && out.link == Link::Connecting;
        assert!(out.write == Some(Closing) || waits, "frontend 5 is answered by 5: {shown}");
    }
    if !view.online && view.own == Some(Closing) && out.link == Link::Idle {
        let alive = !matches!(view.front, None | Some(Closed | Initialising));
        assert_eq!(out.write == Some(Closed), !alive, "removal with a dead frontend: {shown}");
    }
    if view.online && view.own == Some(Closed) && view.front == Some(Initialising) && link == Link::Idle {
        let expected = (view.disk != DiskIs::Failed).then_some(InitWait);
        assert_eq!(out.write, expected, "a frontend that starts again: {shown}");
    }
    out
}

#[test]
fn every_combination_obeys_the_rules() {
    let mut combinations = 0;
    for (link, view) in all_views() {
        for event in EVENTS {
            check(link, view, event);
            combinations += 1;
        }
    }
    assert_eq!(combinations, 10 * 9 * 2 * 3 * 2 * 2 * 6 * 6);
}

/// A shard that does as it is told, and the state that is written.
fn settle(mut link: Link, mut view: View, connects: bool) -> (Link, View, bool) {
    let (mut event, mut removed) = (Event::Look, false);
    // What the shard owes us.
    let (mut owes_connect, mut owes_drain) =
        (matches!(link, Link::Connecting | Link::Abandoning), link == Link::Draining);
    for _ in 0..24 {
        let out = check(link, view, event);
        link = out.link;
        let mut quiet = out.write.is_none() && out.actions.is_empty();
        if out.write.is_some() {
            view.own = out.write;
        }
        for action in out.actions {
            match action {
                Action::Announce => view.announced = true,
                Action::Connect => {
                    assert!(!owes_connect && !owes_drain);
                    owes_connect = true;
                }
                Action::Disconnect => {
                    assert!(!owes_connect && !owes_drain);
                    owes_drain = true;
                }
                Action::Remove => {
                    (view.own, view.front, removed) = (None, None, true);
                }
                Action::Free => return (link, view, removed),
                _ => {}
            }
        }
        event = Event::Look;
        if owes_connect {
            (owes_connect, quiet) = (false, false);
            event = if connects { Event::Connected } else { Event::ConnectFailed };
        } else if owes_drain {
            (owes_drain, quiet) = (false, false);
            event = Event::Drained;
        }
        if quiet {
            return (link, view, removed);
        }
    }
    panic!("no rest: {link:?} {view:?}");
}

#[test]
fn from_everywhere_the_machine_comes_to_rest_where_it_should() {
    for (link, start) in all_views() {
        for connects in [true, false] {
            let (end, view, removed) = settle(link, start, connects);
            let shown = format!("{link:?} {start:?} {connects} -> {end:?} {view:?}");
            assert!(start.ours || !removed, "{shown}");
            let own = start.own;
            if own.is_none() || removed {
                assert!(end == Link::Idle && view.own.is_none(), "{shown}");
                continue;
            }
            if own == Some(Unknown) {
                assert_eq!(view.own, own, "{shown}");
                continue;
            }
            match start.front {
                // Always ends Closed when the frontend is gone.
                None | Some(Closed) => assert_eq!((end, view.own), (Link::Idle, Some(Closed)), "{shown}"),
                Some(Initialising) if !start.online && own == Some(Closing) => {
                    assert_eq!((end, view.own), (Link::Idle, Some(Closed)), "{shown}");
                }
                Some(Initialising) if start.online && start.disk != DiskIs::Failed => {
                    assert_eq!((end, view.own), (Link::Idle, Some(InitWait)), "{shown}");
                }
                Some(Initialised | Connected)
                    if start.online
                        && start.disk == DiskIs::Ready
                        && link == Link::Idle
                        && !matches!(own, Some(Connected | Closing)) =>
                {
                    let expected = if connects {
                        (Link::Connected, Some(Connected))
                    } else {
                        (Link::Idle, Some(Closing))
                    };
                    assert_eq!((end, view.own), expected, "{shown}");
                }
                _ => {}
            }
        }
    }
}

#[test]
fn states_are_parsed_strictly() {
    assert_eq!(XenbusState::parse(b"4"), Connected);
    for rubbish in [&b""[..], b"9", b"44", b" 4", b"4\0", b"-1", b"x", b"04", &[0xff; 4000]] {
        assert_eq!(XenbusState::parse(rubbish), Unknown);
    }
    for state in XenbusState::ALL {
        assert_eq!(XenbusState::parse(state.number().to_string().as_bytes()), state);
    }
}

/// A guest's driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Driver {
    /// As Linux's blkfront: waits for the backend at each step.
    Honest,
    /// Honest, and starts again now and then, from any state, as a kernel started by another does.
    Restarting,
    /// Writes anything at any time.
    Hostile,
}

/// Both ends in XenStore, a shard and a machine, one small step at a time.
struct World {
    random: fastrand::Rng,
    driver: Driver,
    own: Option<XenbusState>,
    front: Option<XenbusState>,
    online: bool,
    /// What a restarting driver writes next.
    restart: Vec<XenbusState>,
    closing_by_driver: bool,
    link: Link,
    announced: bool,
    /// A view that was read and not yet acted on.
    seen: Option<(View, Event)>,
    shard: Link,
    answer: Option<Event>,
    connects: u32,
    freed: bool,
}

impl World {
    fn new(seed: u64, driver: Driver) -> World {
        World {
            random: fastrand::Rng::with_seed(seed),
            driver,
            own: Some(Initialising),
            front: Some(Initialising),
            online: true,
            restart: Vec::new(),
            closing_by_driver: false,
            link: Link::Idle,
            announced: false,
            seen: None,
            shard: Link::Idle,
            answer: None,
            connects: 0,
            freed: false,
        }
    }

    /// One thing happens.
    fn turn(&mut self, faults: bool) {
        match self.random.u32(0..10) {
            0..=2 => self.guest(faults),
            3..=4 => self.read(),
            5..=7 => self.act(),
            8 => self.shard_answers(faults),
            _ if faults && self.random.u32(0..400) == 0 => self.toolstack(),
            _ => {}
        }
    }

    fn guest(&mut self, faults: bool) {
        if self.driver == Driver::Hostile && faults {
            self.front = match self.random.u32(0..10) {
                0 => None,
                n => Some(XenbusState::ALL[n as usize - 1]).filter(|state| *state != Unknown),
            };
            return;
        }
        if self.driver == Driver::Restarting
            && faults
            && self.restart.is_empty()
            && self.random.u32(0..60) == 0
        {
            self.restart = vec![Initialising, Closed, Closing];
        }
        // As a new kernel does: one step, then the backend's answer to it.
        if let Some(&next) = self.restart.last() {
            let answered = match next {
                Closing => true,
                Closed => matches!(self.own, Some(Closing | Closed)),
                _ => self.own == Some(Closed),
            };
            if answered {
                self.front = Some(next);
                self.restart.pop();
            }
            return;
        }
        match (self.front, self.own) {
            (Some(Initialising), Some(InitWait)) => self.front = Some(Initialised),
            (Some(Initialised), Some(Connected)) => self.front = Some(Connected),
            (Some(Initialising | Initialised | Connected), Some(Closing)) => {
                self.front = Some(Closing);
                self.closing_by_driver = true;
            }
            (Some(Closing), Some(Closing | Closed)) if self.closing_by_driver => {
                self.front = Some(Closed);
                self.closing_by_driver = false;
            }
            // A hostile one that has calmed down begins at the beginning.
            (None, Some(Closed)) | (Some(Closed), Some(Closed)) if self.driver == Driver::Hostile => {
                self.front = Some(Initialising);
            }
            (Some(Closing | InitWait | Reconfiguring | Reconfigured), _)
                if self.driver == Driver::Hostile =>
            {
                self.front = Some(Closed);
            }
            _ => {}
        }
    }

    fn toolstack(&mut self) {
        if self.online && self.own.is_some() {
            self.online = false;
            if self.own != Some(Closed) {
                self.own = Some(Closing);
            }
        } else if self.own.is_some() {
            (self.own, self.front) = (None, None);
        }
    }

    fn read(&mut self) {
        let event = self.answer.take().unwrap_or(Event::Look);
        if let Some((_, unhandled)) = self.seen {
            // One thing at a time: what the shard said is not overtaken.
            if event != Event::Look {
                self.answer = Some(event);
            }
            if unhandled != Event::Look {
                return;
            }
        }
        let event = if self.seen.is_some() { Event::Look } else { event };
        let view = View {
            own: self.own,
            front: self.front,
            online: self.online,
            disk: DiskIs::Ready,
            ours: false,
            announced: self.announced,
        };
        self.seen = Some((view, event));
    }

    fn act(&mut self) {
        let Some((view, event)) = self.seen.take() else { return };
        if self.freed {
            return;
        }
        let out = check(self.link, view, event);
        self.link = out.link;
        // The transaction: nothing is written if our state is not the one that was seen.
        let written = out.write.is_some() && self.own == view.own;
        if written {
            self.own = out.write;
        }
        for action in out.actions {
            match action {
                Action::Announce if written => self.announced = true,
                Action::Connect => {
                    assert_eq!(self.shard, Link::Idle, "connects twice");
                    self.shard = Link::Connecting;
                    self.connects += 1;
                }
                Action::Disconnect => {
                    assert_eq!(self.shard, Link::Connected, "disconnects what is not connected");
                    self.shard = Link::Draining;
                }
                Action::Remove => panic!("removes what the toolstack made"),
                Action::Free => {
                    assert_eq!(self.shard, Link::Idle, "frees what is mapped");
                    assert_eq!(self.own, None);
                    self.freed = true;
                }
                _ => {}
            }
        }
        if written && out.write == Some(Closed) {
            assert_eq!(self.shard, Link::Idle, "Closed while the shard has rings");
        }
    }

    fn shard_answers(&mut self, faults: bool) {
        if self.answer.is_some() {
            return;
        }
        match self.shard {
            Link::Connecting if faults && self.random.u32(0..10) == 0 => {
                (self.shard, self.answer) = (Link::Idle, Some(Event::ConnectFailed));
            }
            Link::Connecting => (self.shard, self.answer) = (Link::Connected, Some(Event::Connected)),
            Link::Draining => (self.shard, self.answer) = (Link::Idle, Some(Event::Drained)),
            Link::Connected if faults && self.random.u32(0..200) == 0 => {
                self.answer = Some(if self.random.bool() { Event::Resized } else { Event::RingBroken });
            }
            _ => {}
        }
    }
}

#[test]
fn random_walks_with_frontends_of_all_kinds() {
    let (mut connects, mut freed, mut closed, mut served) = (0, 0, 0, 0);
    for driver in [Driver::Honest, Driver::Restarting, Driver::Hostile] {
        for seed in 0..400 {
            let mut world = World::new(seed, driver);
            for _ in 0..3000 {
                world.turn(true);
            }
            // Then everybody behaves, and what has to come comes.
            for _ in 0..3000 {
                world.turn(false);
            }
            connects += world.connects;
            let shown = format!(
                "{driver:?} seed {seed}: own {:?}, front {:?}, link {:?}, online {}",
                world.own, world.front, world.link, world.online
            );
            match world.own {
                None => {
                    assert!(world.freed && world.shard == Link::Idle, "{shown}");
                    freed += 1;
                }
                Some(Closed) => {
                    assert_eq!(world.shard, Link::Idle, "{shown}");
                    closed += 1;
                }
                // Both ends are connected, or the frontend has stopped where nothing can be done for it.
                Some(Connected) => {
                    assert_eq!(world.shard, Link::Connected, "{shown}");
                    assert_eq!(world.front, Some(Connected), "{shown}");
                    served += 1;
                }
                Some(other) => {
                    let waits =
                        !world.online || matches!(world.front, Some(Closing | InitWait | Initialising));
                    assert!(waits, "stuck in {other:?}: {shown}");
                }
            }
        }
    }
    assert!(
        connects > 2000 && freed > 100 && closed > 50 && served > 50,
        "{connects} {freed} {closed} {served}"
    );
}
