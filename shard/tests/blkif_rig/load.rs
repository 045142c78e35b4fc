//! A load that knows what it must read.

use super::*;

/// A byte of the disk as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Value(u8),
    /// Discarded.
    Anything,
}

struct Running {
    what: u8,
    sector: u64,
    sectors: u64,
    layout: Vec<(u8, u8)>,
    data: Vec<u8>,
}

/// Random requests on a part of a disk, which must read as zeroes at first; what is read is compared with what was written.
pub struct Load {
    first_sector: u64,
    model: Vec<Known>,
    rng: fastrand::Rng,
    depth: usize,
    segments: usize,
    /// Sectors of a logical block.
    block: u64,
    /// Writes are kept.
    keeps: bool,
    running: HashMap<u16, Running>,
}

impl Load {
    pub fn new(first_sector: u64, sectors: u64, kind: &Kind, seed: u64) -> Load {
        Load {
            first_sector,
            model: vec![Known::Value(0); sectors as usize * 512],
            rng: fastrand::Rng::with_seed(seed),
            depth: kind.depth,
            segments: kind.segments,
            block: u64::from(kind.block_bytes) / 512,
            keeps: true,
            running: HashMap::new(),
        }
    }

    /// On a disk that forgets writes.
    pub fn forgetful(mut self) -> Load {
        self.keeps = false;
        self
    }

    /// Does `requests` requests and waits for all of them.
    pub fn run(&mut self, queue: &mut Queue, requests: usize) {
        let (mut begun, mut done) = (0, 0);
        while done < requests {
            let mut published = false;
            while begun < requests && self.running.len() < self.depth && queue.has_room() {
                if !self.begin(queue) {
                    break;
                }
                begun += 1;
                published = true;
            }
            if published {
                queue.publish();
            }
            queue.wait();
            for completion in std::mem::take(&mut queue.completions) {
                self.check(queue, completion);
                done += 1;
            }
        }
        assert!(self.running.is_empty());
    }

    /// Starts a request; false when the place that was chosen is in use.
    fn begin(&mut self, queue: &mut Queue) -> bool {
        let total = self.model.len() as u64 / 512;
        let what = match self.rng.u32(0..100) {
            0..45 => READ,
            45..88 => WRITE,
            88..91 => FLUSH,
            91..93 => BARRIER,
            93..95 => 100 + FLUSH,
            95..96 => 100 + BARRIER,
            96..98 => operation::DISCARD,
            _ => 100 + operation::DISCARD,
        };
        // What is in 100 and more: a flush or barrier with data, a discard that erases.
        let (wire, with_data) = match what {
            100.. if what - 100 != operation::DISCARD => (what - 100, true),
            100.. => (operation::DISCARD, false),
            READ | WRITE => (what, true),
            _ => (what, false),
        };
        let erases = wire == operation::DISCARD;
        let direct = matches!(wire, FLUSH | BARRIER);
        let pages = if direct { self.segments.min(11) } else { self.segments };
        let most = (pages as u64 * 8).min(total) / self.block;
        let sectors = match (with_data || erases, self.rng.bool()) {
            (false, _) => 0,
            (true, true) => self.rng.u64(1..=most.min(8)) * self.block,
            (true, false) => self.rng.u64(1..=most) * self.block,
        };
        let sector = self.rng.u64(0..=(total - sectors) / self.block) * self.block;
        let sector = sector.min(total - sectors);
        let overlaps = |other: &Running| {
            sector < other.sector + other.sectors
                && other.sector < sector + sectors
                && !(wire == READ && other.what == READ)
        };
        if sectors > 0 && self.running.values().any(overlaps) {
            return false;
        }
        let bytes = sectors as usize * 512;
        let full = sectors > pages as u64 * 4 || self.block > 1;
        let rng = &mut self.rng;
        let mut layout = queue.lay_out(bytes, |_| if full { 0 } else { rng.u8(0..4) });
        if layout.len() > pages {
            layout = queue.lay_out(bytes, |_| 0);
        }
        let mut data = vec![0; bytes];
        self.rng.fill(&mut data);
        let place = self.first_sector + sector;
        let index = match wire {
            operation::DISCARD => queue.submit_message(frontend::discard(place, sectors, what >= 100), &[]),
            // Rubbish in the pages of a read: it must all be overwritten.
            _ => queue.submit(wire, if sectors == 0 { 0 } else { place }, &layout, Some(&data)),
        };
        let what = if what == 100 + operation::DISCARD { what } else { wire };
        let data = if what == READ { Vec::new() } else { data };
        self.running.insert(index, Running { what, sector, sectors, layout, data });
        true
    }

    fn check(&mut self, queue: &mut Queue, completion: Completion) {
        let running = self.running.remove(&completion.index).expect("a request");
        let Running { what, sector, sectors, layout, data } = running;
        assert_eq!(completion.status, Status::Okay, "operation {what} at {sector}, {sectors} sectors");
        let range = sector as usize * 512..(sector + sectors) as usize * 512;
        let model = &mut self.model[range];
        match what {
            READ => {
                let found = queue.data(completion.index, &layout);
                for (at, (found, known)) in found.iter().zip(model.iter()).enumerate() {
                    let good = matches!(known, Known::Anything) || *known == Known::Value(*found);
                    assert!(good, "byte {at} of {sectors} sectors at {sector}: {found}, not {known:?}");
                }
            }
            _ if !self.keeps => {}
            operation::DISCARD => model.fill(Known::Anything),
            d if d == 100 + operation::DISCARD => model.fill(Known::Value(0)),
            _ => {
                for (known, byte) in model.iter_mut().zip(&data) {
                    *known = Known::Value(*byte);
                }
            }
        }
        queue.release(completion.index);
    }
}
