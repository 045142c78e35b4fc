//! What a frontend wrote into XenStore: copied once, bounded, checked, and turned into plain numbers.
//!
//! A guest writes these nodes and may write anything at any time. So the nodes that are needed are read once each into [`Nodes`];
//! this module sees only that copy. Its result names numbers and nothing else: no path, no text of the guest gets further.
//!
//! ```text
//! top names ─read─▶ Layout (protocol, queues, where ring references are) ─▶ further names ─read─▶ Connect
//! ```
//! Source: `xen/include/public/io/blkif.h`, and what Linux's blkback makes of it where the header is silent.

use std::collections::BTreeMap;

use super::device::Domid;
use super::wire::shown;

/// Queues that one device may have.
pub const QUEUES_MAX: u32 = 8;

/// Pages of one ring, as a power of two.
pub const RING_PAGE_ORDER_MAX: u32 = 4;

/// Event channel ports of a domain are below this (FIFO ABI).
const PORTS_END: u32 = 1 << 17;

/// Digits of the largest number.
const DIGITS_MAX: usize = 10;

/// How requests lie in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Entries of 108 bytes.
    X86_32,
    /// Entries of 112 bytes.
    X86_64,
    /// The same layout as x86_64.
    Arm,
}

impl Protocol {
    /// What a frontend that names none speaks. The header says "native"; on x86 every backend takes the oldest instead, and
    /// frontends rely on it.
    pub const DEFAULT: Protocol =
        if cfg!(target_arch = "aarch64") { Protocol::Arm } else { Protocol::X86_32 };

    const NAMES: [(&'static str, Protocol); 3] =
        [("x86_32-abi", Protocol::X86_32), ("x86_64-abi", Protocol::X86_64), ("arm-abi", Protocol::Arm)];
}

/// One ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Grant references of its pages, in order.
    pub grefs: Vec<u32>,
    /// The guest's end of the event channel.
    pub port: u32,
}

/// What a shard needs to serve a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// The guest.
    pub domid: Domid,
    /// Its device.
    pub devid: u32,
    /// The layout of its requests.
    pub protocol: Protocol,
    /// Its rings, at least one.
    pub queues: Vec<Queue>,
    /// Pages of rings are named `ring-ref0` and so on, not `ring-ref`.
    pub numbered: bool,
    /// The guest uses the same grants again and again, all of them writable.
    pub persistent: bool,
}

/// A node of the frontend is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the frontend's {key} is {found}; expected {expected}")]
pub struct KeyError {
    /// Which node, below the frontend's directory.
    pub key: String,
    /// Its value, or that it is missing.
    pub found: String,
    /// What it should be.
    pub expected: String,
}

/// Nodes as they were read once: none where there was no such node.
pub type Nodes = BTreeMap<String, Option<Vec<u8>>>;

/// What was offered to the frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// The largest ring.
    pub ring_page_order: u32,
    /// The most queues.
    pub queues: u32,
    /// The lowest number of an event channel: 1 on Xen, 0 of clients that share memory.
    pub first_port: u32,
}

/// The nodes to read first.
pub fn top_names() -> Vec<String> {
    ["protocol", "feature-persistent", "ring-page-order", "num-ring-pages", "multi-queue-num-queues"]
        .map(str::to_owned)
        .into()
}

/// How the nodes of rings are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// One page, at `ring-ref`.
    Single,
    /// `ring-ref0` and so on.
    Numbered(u32),
    /// One page under the deprecated key: at `ring-ref`, or `ring-ref0`.
    Either,
}

/// What the first nodes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    protocol: Protocol,
    persistent: bool,
    queues: u32,
    first_port: u32,
    pages: Pages,
}

impl Layout {
    /// Checks the nodes of [`top_names`].
    pub fn read(nodes: &Nodes, offer: Offer) -> Result<Layout, KeyError> {
        let protocol = match value(nodes, "protocol") {
            None => Protocol::DEFAULT,
            Some(text) => Protocol::NAMES
                .iter()
                .find(|(name, _)| name.as_bytes() == text)
                .map(|(_, protocol)| *protocol)
                .ok_or_else(|| wrong("protocol", Some(text), "x86_32-abi, x86_64-abi or arm-abi"))?,
        };
        let queues =
            optional(nodes, "multi-queue-num-queues", 1..=offer.queues.min(QUEUES_MAX))?.unwrap_or(1);
        Ok(Layout {
            protocol,
            persistent: optional(nodes, "feature-persistent", 0..=1)? == Some(1),
            queues,
            first_port: offer.first_port,
            pages: pages(nodes, offer.ring_page_order.min(RING_PAGE_ORDER_MAX))?,
        })
    }

    /// The nodes to read next.
    pub fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for queue in 0..self.queues {
            let prefix = self.prefix(queue);
            names.push(format!("{prefix}event-channel"));
            match self.pages {
                Pages::Single => names.push(format!("{prefix}ring-ref")),
                Pages::Either => {
                    names.extend([format!("{prefix}ring-ref"), format!("{prefix}ring-ref0")]);
                }
                Pages::Numbered(count) => {
                    names.extend((0..count).map(|page| format!("{prefix}ring-ref{page}")));
                }
            }
        }
        names
    }

    /// One queue keeps its nodes at the top, two or more have directories.
    fn prefix(&self, queue: u32) -> String {
        if self.queues == 1 { String::new() } else { format!("queue-{queue}/") }
    }

    /// Checks the nodes of [`Layout::names`].
    pub fn connect(&self, domid: Domid, devid: u32, nodes: &Nodes) -> Result<Connect, KeyError> {
        let (mut grefs_seen, mut ports_seen) = (BTreeMap::new(), BTreeMap::new());
        let mut queues = Vec::new();
        for queue in 0..self.queues {
            let prefix = self.prefix(queue);
            let pages = match self.pages {
                Pages::Single => vec![format!("{prefix}ring-ref")],
                Pages::Numbered(count) => (0..count).map(|page| format!("{prefix}ring-ref{page}")).collect(),
                Pages::Either => {
                    let old = format!("{prefix}ring-ref");
                    vec![if value(nodes, &old).is_some() { old } else { format!("{prefix}ring-ref0") }]
                }
            };
            let mut grefs = Vec::new();
            for key in pages {
                let gref = required(nodes, &key, 0..=u32::MAX)?;
                once(&mut grefs_seen, gref, &key)?;
                grefs.push(gref);
            }
            let key = format!("{prefix}event-channel");
            let port = required(nodes, &key, self.first_port..=PORTS_END - 1)?;
            once(&mut ports_seen, port, &key)?;
            queues.push(Queue { grefs, port });
        }
        Ok(Connect {
            domid,
            devid,
            protocol: self.protocol,
            queues,
            numbered: matches!(self.pages, Pages::Numbered(_)),
            persistent: self.persistent,
        })
    }
}

/// Whether `ring-page-order` is *there* decides, not its value: nodes of an earlier driver may lie around.
fn pages(nodes: &Nodes, order_max: u32) -> Result<Pages, KeyError> {
    if let Some(order) = optional(nodes, "ring-page-order", 0..=order_max)? {
        return Ok(Pages::Numbered(1 << order));
    }
    match optional(nodes, "num-ring-pages", 1..=1 << order_max)? {
        None => Ok(Pages::Single),
        Some(1) => Ok(Pages::Either),
        Some(count) if count.is_power_of_two() => Ok(Pages::Numbered(count)),
        Some(_) => Err(wrong("num-ring-pages", value(nodes, "num-ring-pages"), "a power of two")),
    }
}

/// Two rings on one page, or two queues on one port, are a lie.
fn once(seen: &mut BTreeMap<u32, String>, number: u32, key: &str) -> Result<(), KeyError> {
    match seen.insert(number, key.to_owned()) {
        None => Ok(()),
        Some(other) => Err(KeyError {
            key: key.to_owned(),
            found: number.to_string(),
            expected: format!("a number of its own, not that of {other}"),
        }),
    }
}

fn value<'a>(nodes: &'a Nodes, key: &str) -> Option<&'a [u8]> {
    nodes.get(key)?.as_deref()
}

fn wrong(key: &str, found: Option<&[u8]>, expected: &str) -> KeyError {
    let found = found.map_or_else(|| "missing".to_owned(), |bytes| format!("\"{}\"", shown(bytes)));
    KeyError { key: key.to_owned(), found, expected: expected.to_owned() }
}

fn optional(nodes: &Nodes, key: &str, range: std::ops::RangeInclusive<u32>) -> Result<Option<u32>, KeyError> {
    let Some(text) = value(nodes, key) else { return Ok(None) };
    match decimal(text).filter(|number| range.contains(number)) {
        Some(number) => Ok(Some(number)),
        None => Err(wrong(key, Some(text), &expected(&range))),
    }
}

fn required(nodes: &Nodes, key: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, KeyError> {
    optional(nodes, key, range.clone())?.ok_or_else(|| wrong(key, None, &expected(&range)))
}

fn expected(range: &std::ops::RangeInclusive<u32>) -> String {
    format!("a decimal number from {} to {}", range.start(), range.end())
}

/// Digits and nothing else: no sign, no blank, no NUL at the end.
pub(super) fn decimal(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > DIGITS_MAX || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    //! Goal: each rule of the protocol for frontends' nodes, and that rubbish is refused by name, value and expectation.
    //! Method: directories written by hand; then random values in every node.

    use super::*;

    const OFFER: Offer = Offer { ring_page_order: 4, queues: 8, first_port: 1 };

    fn nodes(pairs: &[(&str, &str)]) -> Nodes {
        pairs.iter().map(|(key, text)| ((*key).to_owned(), Some(text.as_bytes().to_vec()))).collect()
    }

    fn connect(pairs: &[(&str, &str)]) -> Result<Connect, KeyError> {
        let all = nodes(pairs);
        let layout = Layout::read(&all, OFFER)?;
        // Only what is asked for may be used.
        let asked = layout.names();
        let given = all.into_iter().filter(|(name, _)| asked.contains(name)).collect();
        layout.connect(5, 51712, &given)
    }

    fn one(grefs: &[u32], port: u32) -> Vec<Queue> {
        vec![Queue { grefs: grefs.to_vec(), port }]
    }

    #[test]
    fn one_page_is_at_ring_ref_unless_an_order_is_there() {
        let stale = [("ring-ref", "8"), ("ring-ref0", "9"), ("event-channel", "12")];
        assert_eq!(connect(&stale).unwrap().queues, one(&[8], 12));
        let mut with_order = stale.to_vec();
        with_order.push(("ring-page-order", "0"));
        assert_eq!(connect(&with_order).unwrap().queues, one(&[9], 12));
    }

    #[test]
    fn the_default_protocol_is_the_oldest() {
        let found = connect(&[("ring-ref", "8"), ("event-channel", "12")]).unwrap();
        assert_eq!((found.protocol, found.persistent), (Protocol::DEFAULT, false));
        assert_eq!((found.domid, found.devid), (5, 51712));
        for (name, protocol) in Protocol::NAMES {
            let pairs =
                [("ring-ref", "8"), ("event-channel", "12"), ("protocol", name), ("feature-persistent", "1")];
            let found = connect(&pairs).unwrap();
            assert_eq!((found.protocol, found.persistent), (protocol, true));
        }
    }

    #[test]
    fn pages_by_both_keys() {
        let two = [("ring-ref0", "8"), ("ring-ref1", "9"), ("event-channel", "1")];
        for extra in [("ring-page-order", "1"), ("num-ring-pages", "2")] {
            let mut pairs = two.to_vec();
            pairs.push(extra);
            assert_eq!(connect(&pairs).unwrap().queues, one(&[8, 9], 1));
        }
        for old in [("ring-ref", "7"), ("ring-ref0", "7")] {
            let pairs = [old, ("num-ring-pages", "1"), ("event-channel", "1")];
            assert_eq!(connect(&pairs).unwrap().queues, one(&[7], 1));
        }
        // The new key wins over a twin that an earlier driver left.
        let mut both = two.to_vec();
        both.extend([("ring-page-order", "1"), ("num-ring-pages", "16")]);
        assert_eq!(connect(&both).unwrap().queues.len(), 1);
    }

    #[test]
    fn queues_absent_one_and_many() {
        let top = [("ring-ref", "8"), ("event-channel", "12"), ("multi-queue-num-queues", "1")];
        assert_eq!(connect(&top).unwrap().queues, one(&[8], 12));
        let many = [
            ("multi-queue-num-queues", "2"),
            ("ring-ref", "77"),
            ("event-channel", "78"),
            ("queue-0/ring-ref", "1"),
            ("queue-0/event-channel", "2"),
            ("queue-1/ring-ref", "3"),
            ("queue-1/event-channel", "4"),
        ];
        let queues = [one(&[1], 2), one(&[3], 4)].concat();
        assert_eq!(connect(&many).unwrap().queues, queues);
    }

    #[test]
    fn lies_are_named() {
        let good = [("ring-ref", "8"), ("event-channel", "12")];
        for (key, text, expected) in [
            ("multi-queue-num-queues", "0", "from 1 to 8"),
            ("multi-queue-num-queues", "9", "from 1 to 8"),
            ("ring-page-order", "5", "from 0 to 4"),
            ("num-ring-pages", "3", "power of two"),
            ("num-ring-pages", "0", "from 1 to 16"),
            ("num-ring-pages", "32", "from 1 to 16"),
            ("protocol", "sparc-abi", "x86_64-abi"),
            ("protocol", "", "x86_64-abi"),
            ("feature-persistent", "2", "from 0 to 1"),
            ("ring-ref", "-1", "decimal number"),
            ("ring-ref", " 8", "decimal number"),
            ("ring-ref", "8\n", "decimal number"),
            ("ring-ref", "8\0", "decimal number"),
            ("ring-ref", "0x8", "decimal number"),
            ("ring-ref", "4294967296", "decimal number"),
            ("ring-ref", "00000000008", "decimal number"),
            ("ring-ref", "", "decimal number"),
            ("event-channel", "0", "from 1 to 131071"),
            ("event-channel", "131072", "from 1 to 131071"),
        ] {
            let mut pairs = good.to_vec();
            pairs.retain(|(name, _)| *name != key);
            pairs.push((key, text));
            let error = connect(&pairs).unwrap_err();
            assert_eq!(error.key, key);
            assert!(error.expected.contains(expected), "{error}");
            assert!(error.found.contains(&shown(text.as_bytes())), "{error}");
        }
        let missing = connect(&[("ring-ref", "8")]).unwrap_err();
        assert_eq!((missing.key.as_str(), missing.found.as_str()), ("event-channel", "missing"));
        let long = "9".repeat(4000);
        let error = connect(&[("ring-ref", long.as_str()), ("event-channel", "1")]).unwrap_err();
        assert!(error.to_string().len() < 250, "a guest's value does not fill our log");
    }

    #[test]
    fn nothing_is_used_twice() {
        let twin = [("ring-page-order", "1"), ("ring-ref0", "8"), ("ring-ref1", "8"), ("event-channel", "1")];
        assert!(connect(&twin).unwrap_err().expected.contains("not that of ring-ref0"));
        let ports = [
            ("multi-queue-num-queues", "2"),
            ("queue-0/ring-ref", "1"),
            ("queue-0/event-channel", "2"),
            ("queue-1/ring-ref", "3"),
            ("queue-1/event-channel", "2"),
        ];
        assert!(connect(&ports).unwrap_err().expected.contains("queue-0/event-channel"));
    }

    #[test]
    fn a_smaller_offer_binds() {
        let all = nodes(&[("multi-queue-num-queues", "2")]);
        assert!(Layout::read(&all, Offer { queues: 1, ..OFFER }).is_err());
        let all = nodes(&[("ring-page-order", "1")]);
        assert!(Layout::read(&all, Offer { ring_page_order: 0, ..OFFER }).is_err());
        // An offer beyond what the engine can do does not widen it.
        let all = nodes(&[("multi-queue-num-queues", "9")]);
        assert!(Layout::read(&all, Offer { ring_page_order: 9, queues: 99, ..OFFER }).is_err());
    }

    #[test]
    fn random_values_give_bounded_numbers_or_an_error() {
        let mut random = fastrand::Rng::with_seed(17);
        let values = [
            "0",
            "1",
            "2",
            "3",
            "4",
            "8",
            "16",
            "17",
            "4294967295",
            "x",
            "",
            "x86_64-abi",
            "-1",
            "9999999999",
        ];
        let mut good = 0;
        for _ in 0..200_000 {
            let mut all = Nodes::new();
            for name in top_names() {
                if random.u32(..3) == 0 {
                    all.insert(name, Some(random.choice(values).unwrap().as_bytes().to_vec()));
                }
            }
            let Ok(layout) = Layout::read(&all, OFFER) else { continue };
            let names = layout.names();
            assert!(names.len() <= 8 * 17);
            let mut next = 1;
            let given = names
                .into_iter()
                .map(|name| {
                    next += 1;
                    let text = if random.u32(..50) == 0 { "rubbish".into() } else { next.to_string() };
                    (name, (random.u32(..50) > 0).then(|| text.into_bytes()))
                })
                .collect();
            if let Ok(connect) = layout.connect(1, 2, &given) {
                good += 1;
                assert!((1..=8).contains(&connect.queues.len()));
                let pages = connect.queues[0].grefs.len();
                assert!(pages.is_power_of_two() && pages <= 16);
                assert!(connect.queues.iter().all(|queue| queue.grefs.len() == pages));
                assert!(connect.queues.iter().all(|queue| (1..PORTS_END).contains(&queue.port)));
            }
        }
        assert!(good > 1000, "only {good} directories were good: the test tests nothing");
    }
}
