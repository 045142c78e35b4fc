//! When a port may report again: the answer to guests that notify without having anything to say (XSA-332).
//!
//! A port is masked from its event until its work is done, so a guest can cause one event per turn at most. If that turn finds
//! nothing in the ring, again and again, the port stays masked for a while after the work, longer each time. The ring is not
//! deaf meanwhile: an honest frontend's notification is kept by the hypervisor and delivered at the unmask; the most that it waits
//! is [`DELAY_MAX`].
//!
//! Pure: no clock, no descriptors.

use super::Nanos;

/// Events in a row that may find nothing. Frontends notify late now and then, when the backend has already seen the request.
pub const FREE: u8 = 8;
/// The first delay.
pub const DELAY_FIRST: Nanos = 100_000;
/// The longest delay.
pub const DELAY_MAX: Nanos = 10_000_000;

/// What to do with a port after its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmask {
    /// Unmask it with the others of this turn.
    Now,
    /// Hold it for so many nanoseconds, then look at the ring and unmask it.
    After(Nanos),
}

/// Memory of one port.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Damper {
    spurious: u8,
}

impl Damper {
    /// Tells that an event of the port has been handled. `useful`: since the event before, at least one request was taken from the
    /// ring, by this event's turn or any other (a ring that was polled empty is not a liar).
    ///
    /// A useful event takes back two spurious ones, so that a guest cannot buy eight with each request, and one that is right
    /// in every third case is never delayed.
    pub fn handled(&mut self, useful: bool) -> Unmask {
        if useful {
            self.spurious = self.spurious.saturating_sub(2);
        } else {
            self.spurious = self.spurious.saturating_add(1).min(FREE + 8);
        }
        match self.spurious.checked_sub(FREE) {
            None | Some(0) => Unmask::Now,
            Some(over) => Unmask::After((DELAY_FIRST << (over - 1)).min(DELAY_MAX)),
        }
    }

    /// Whether the port is being delayed, for metrics.
    pub fn is_damped(&self) -> bool {
        self.spurious > FREE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a guest notify whenever it can for a second; every `useful`-th event has work (0: none). Returns the number of events.
    fn second_of_storm(useful: u32) -> u32 {
        let (mut damper, mut now, mut events) = (Damper::default(), 0, 0);
        while now < 1_000_000_000 {
            events += 1;
            now += 5_000; // a turn that looks at the ring
            let work = useful > 0 && events % useful == 0;
            if let Unmask::After(delay) = damper.handled(work) {
                now += delay;
            }
        }
        events
    }

    // Goal: XSA-332: a storm of events with nothing behind them costs next to nothing.
    // Method: virtual time; 5 us per event; the events of one second are counted: the free ones, one per step, then one in 10 ms.
    #[test]
    fn xsa_332_a_storm_without_requests_is_damped() {
        let steps = 8;
        let most = u32::from(FREE) + steps + (1_000_000_000 / DELAY_MAX) as u32;
        assert!(second_of_storm(0) <= most, "{} events", second_of_storm(0));
    }

    // Goal: a storm cannot be bought with a request now and then, and honest frontends are never delayed.
    // Method: the same second with work in every tenth event, in every third, and in each.
    #[test]
    fn xsa_332_few_requests_do_not_buy_a_storm() {
        assert!(second_of_storm(10) < 2_000, "{} events", second_of_storm(10));
        assert_eq!(second_of_storm(3), 200_000);
        assert_eq!(second_of_storm(1), 200_000);
    }

    // Goal: a damped port recovers, by itself, when it has work again.
    #[test]
    fn a_port_that_has_work_again_recovers() {
        let mut damper = Damper::default();
        for _ in 0..1000 {
            damper.handled(false);
        }
        assert_eq!(damper.handled(false), Unmask::After(DELAY_MAX));
        assert!(damper.is_damped());
        let useful = (0..).take_while(|_| damper.handled(true) != Unmask::Now).count();
        assert!(useful <= 4, "{useful}");
        assert!(!damper.is_damped());
    }
}
