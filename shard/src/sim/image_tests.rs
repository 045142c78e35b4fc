//! Goal: what a swap, a resize, a move or a long request of an image does at its worst moment. Method: the operator's acts one by
//! one on one disk, with the operation that fails named; what is answered is in the tally, and the byte model looks on.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::file::File;
use super::kernel::What;
use super::operator::{Kind, SimDisk};
use super::oracle::Model;
use super::scenario::{Plan, Sim, token};
use crate::api::{Backend, CacheMode, Command, DiskState, ErrorPolicy, FileKind, ImageFile};

const SIZE: u64 = 256 << 10;

/// One disk of so many overlays over a raw file, attached to shard 0 or 1, and a test as its operator.
struct Rig {
    sim: Sim,
    shard: usize,
}

impl Rig {
    fn new(overlays: usize, policy: ErrorPolicy) -> Rig {
        let plan = Plan {
            disks: 0,
            clients: 0,
            rounds: 0,
            requests: 1,
            faults: false,
            commands: false,
            budget: 4 << 20,
            size_max: SIZE,
            rare_max: SIZE,
        };
        let mut sim = Sim::new(7, plan, std::env::var_os("SIM_VERBOSE").is_some());
        sim.scripted = true;
        let image = Arc::new(ImageFile {
            fd: token(),
            tail: None,
            offset_align: 512,
            memory_align: 512,
            cache: CacheMode::None,
            kind: FileKind::Regular,
            length: SIZE,
            length_now: SIZE.into(),
            punts: false,
            store: 1,
        });
        let mut file = File::of(0, vec![0; SIZE as usize]);
        (file.align, file.memory_align, file.store) = (512, 512, 1);
        let mut world = sim.world.borrow_mut();
        world.files.push(file);
        world.register_file(image.fd.as_raw_fd(), 0, true);
        drop(world);
        sim.disks.push(SimDisk::new(image, SIZE, Model::new(SIZE), policy, policy, false));
        let mut rig = Rig { sim, shard: 0 };
        for _ in 0..overlays {
            rig.sim.disks[0].backend = rig.overlay();
        }
        rig.sim.attach(0);
        let super::operator::Place::Shard(shard) = rig.sim.disks[0].place else { panic!("it is attached") };
        rig.shard = shard;
        rig.rest();
        assert_eq!(rig.count("Add"), 1);
        rig
    }

    fn overlay(&mut self) -> Backend {
        Backend::Image(self.sim.overlay(0).expect("one more"))
    }

    fn rest(&mut self) {
        self.sim.run_to_rest();
    }

    /// How often something was answered.
    fn count(&self, what: &str) -> u64 {
        self.sim.tally.get(what).copied().unwrap_or(0)
    }

    /// Sends a command, without waiting for anything.
    fn send(&mut self, kind: Kind) {
        let disk = self.sim.disks[0].id;
        let command = match kind {
            Kind::Pause => Command::Pause { disk },
            Kind::Resume => Command::Resume { disk, data_in_doubt: false },
            Kind::ResumeInDoubt => Command::Resume { disk, data_in_doubt: true },
            Kind::Park => Command::Park { disk },
            Kind::CancelPark => Command::CancelPark { disk },
            Kind::Fail => Command::Fail { disk },
            Kind::Remove => Command::RemoveDisk { disk, force: false },
            other => panic!("{other:?} has more to say"),
        };
        self.sim.world.borrow_mut().set_frozen(0, false);
        self.sim.command(0, self.shard, command, kind);
    }

    fn tell(&mut self, kind: Kind) {
        self.send(kind);
        self.rest();
    }

    fn swap(&mut self, to: Backend) {
        self.sim.swap_to(0, self.shard, to);
        self.rest();
    }

    fn resize(&mut self, size_bytes: u64) {
        self.sim.disks[0].model.grow(size_bytes);
        self.sim.resizes.insert(0, size_bytes);
        let disk = self.sim.disks[0].id;
        self.sim.command(0, self.shard, Command::Resize { disk, size_bytes }, Kind::Resize);
    }

    /// A new client that asks so many questions: writes in thousandths of them, and reads.
    fn client(&mut self, questions: u32, write: u64) {
        self.sim.connect(0);
        let number = self.sim.clients.len() - 1;
        let client = &mut self.sim.clients[number];
        let window = (0, SIZE);
        client.budget = questions;
        client.habits = super::client::Habits {
            depth: 4,
            align: 512,
            usual_max: 4096,
            rare_max: 4096,
            write,
            flush: 0,
            erase: 0,
            status: 0,
            fua: 0,
            bad: 0,
            step: 1 << 20,
            window,
        };
    }

    /// Goes on, step by step, until something is so.
    fn step_until(&mut self, mut is_so: impl FnMut(&Rig) -> bool) {
        for _ in 0..100_000 {
            self.sim.turn_shards();
            if is_so(self) {
                return;
            }
            let next = self.sim.world.borrow_mut().next();
            if let Some(event) = next {
                self.sim.happen(event);
            }
        }
        panic!("it never is");
    }

    /// The operation of that number of its kind, from now on, fails on a file.
    fn plot(&mut self, file: usize, what: What, number: u32) {
        self.sim.world.borrow_mut().files[file].plots.push((what, number));
    }

    fn state(&self) -> DiskState {
        let state = self.sim.disks[0].counters.state.get();
        let all = [DiskState::Running, DiskState::Paused, DiskState::StorageError, DiskState::Failed];
        all.into_iter().find(|known| *known as u64 == state).expect("one of these")
    }
}

#[test]
fn a_failed_fdatasync_of_the_old_image_outlives_the_swap_that_found_it() {
    let mut rig = Rig::new(0, ErrorPolicy::Report);
    rig.client(20, 1000);
    rig.rest();
    assert_eq!(rig.count("change done"), 20);
    rig.tell(Kind::Pause);
    // The first is the raw disk's own, the second is that of the lower layer when the overlay is opened.
    rig.plot(0, What::Sync, 2);
    let (old, overlay) = (rig.sim.disks[0].backend.clone(), rig.overlay());
    rig.swap(overlay);
    assert_eq!(rig.count("Swap refused: Failed"), 1);
    // As the daemon does: it is told to take the image that it has.
    rig.swap(old);
    assert_eq!((rig.count("Swap"), rig.state()), (1, DiskState::Paused));
    rig.tell(Kind::Resume);
    assert_eq!((rig.count("Resume refused: DataInDoubt"), rig.count("Resume")), (1, 0));
    assert_eq!(rig.sim.disks[0].counters.flush_failures.get(), 1);
    rig.tell(Kind::ResumeInDoubt);
    assert_eq!(rig.sim.disks[0].counters.data_in_doubt.get(), 1);
    // It serves again.
    rig.client(20, 500);
    rig.rest();
    assert_eq!(rig.count("change failed") + rig.count("read failed"), 0);
}

#[test]
fn a_raw_disk_is_durable_before_it_gives_its_file_away_or_keeps_it() {
    let mut rig = Rig::new(0, ErrorPolicy::Pause);
    rig.client(20, 1000);
    rig.rest();
    rig.tell(Kind::Pause);
    let old = rig.sim.disks[0].backend.clone();
    rig.swap(Backend::Null);
    assert_eq!(rig.count("Swap"), 1);
    rig.sim.check_durable_all(0);
    rig.swap(old);
    rig.tell(Kind::Resume);
    rig.client(20, 1000);
    rig.rest();
    rig.tell(Kind::Pause);
    rig.plot(0, What::Sync, 1);
    rig.swap(Backend::Null);
    assert_eq!((rig.count("Swap refused: DataInDoubt"), rig.state()), (1, DiskState::Paused));
    rig.tell(Kind::Resume);
    assert_eq!(rig.count("Resume refused: DataInDoubt"), 1);
    // Nor can it be taken away as if nothing had happened.
    rig.tell(Kind::Remove);
    assert_eq!((rig.count("Remove refused: Failed"), rig.state()), (1, DiskState::StorageError));
    rig.tell(Kind::ResumeInDoubt);
    rig.client(20, 500);
    rig.rest();
    assert_eq!(rig.count("change failed") + rig.count("read failed"), 0);
}

#[test]
fn a_move_taken_back_when_the_image_was_closed_opens_it_again() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    rig.client(10, 500);
    rig.rest();
    rig.send(Kind::Park);
    rig.step_until(|rig| rig.sim.world.borrow().is_busy(0));
    // The command comes in the turn in which the last operation of the close has ended.
    for _ in 0..1000 {
        if !rig.sim.world.borrow().is_busy(0) {
            break;
        }
        rig.sim.world.borrow_mut().next();
    }
    rig.send(Kind::CancelPark);
    for _ in 0..1000 {
        if !rig.sim.world.borrow().is_waking(rig.shard) {
            break;
        }
        rig.sim.world.borrow_mut().next();
    }
    rig.rest();
    assert_eq!((rig.count("Park refused: Interrupted"), rig.count("CancelPark")), (1, 1));
    rig.client(20, 500);
    rig.rest();
    assert_eq!(rig.count("change failed") + rig.count("read failed"), 0);
}

#[test]
fn a_detach_may_come_while_a_move_is_taken_back() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    rig.client(10, 500);
    rig.rest();
    rig.send(Kind::Park);
    rig.step_until(|rig| rig.sim.world.borrow().is_busy(0));
    rig.send(Kind::CancelPark);
    rig.send(Kind::Remove);
    rig.rest();
    assert_eq!((rig.count("CancelPark"), rig.count("Remove")), (1, 1));
}

#[test]
fn a_refused_resize_is_told_and_the_disk_runs_on() {
    let mut rig = Rig::new(1, ErrorPolicy::Pause);
    rig.resize(SIZE / 2);
    rig.rest();
    assert_eq!((rig.count("Resize refused: Failed"), rig.state()), (1, DiskState::Running));
    // Nor is one held whose fdatasync fails; but then the data are in doubt.
    rig.plot(1, What::Sync, 1);
    rig.resize(SIZE * 2);
    rig.rest();
    assert_eq!((rig.count("Resize refused: Failed"), rig.state()), (2, DiskState::StorageError));
    rig.tell(Kind::ResumeInDoubt);
    rig.resize(SIZE * 4);
    rig.rest();
    assert_eq!((rig.count("Resize"), rig.state()), (1, DiskState::Running));
}

#[test]
fn an_image_that_cannot_be_closed_is_open_again_when_the_swap_is_answered() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    rig.client(10, 1000);
    rig.rest();
    rig.tell(Kind::Pause);
    rig.plot(1, What::Sync, 1);
    let (old, overlay) = (rig.sim.disks[0].backend.clone(), rig.overlay());
    rig.sim.swap_to(0, rig.shard, overlay);
    rig.step_until(|rig| rig.count("Swap refused: Failed") > 0);
    // At once, as the daemon does.
    rig.swap(old);
    assert_eq!((rig.count("Swap"), rig.state()), (1, DiskState::Paused));
    rig.tell(Kind::Resume);
    assert_eq!(rig.count("Resume refused: DataInDoubt"), 1);
    rig.tell(Kind::ResumeInDoubt);
    rig.client(20, 500);
    rig.rest();
    assert_eq!(rig.count("change failed") + rig.count("read failed"), 0);
}

#[test]
fn a_write_of_tables_waits_for_a_buffer_like_everybody_else() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    // What it reads first is in memory.
    rig.client(1, 1000);
    rig.rest();
    let index = rig.shard;
    rig.sim.shards[index].take_buffers_away();
    rig.resize(SIZE + 512);
    let until = rig.sim.world.borrow().now + 50 * crate::clock::MILLISECOND;
    rig.step_until(|rig| rig.sim.world.borrow().now >= until);
    assert_eq!(rig.count("Resize refused: Failed") + rig.count("Resize"), 0, "it waits");
    rig.sim.shards[index].give_buffers_back();
    rig.sim.world.borrow_mut().wake(index);
    rig.rest();
    assert_eq!(rig.count("Resize"), 1);
}

#[test]
fn a_resume_that_is_refused_accepts_nothing() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    rig.plot(1, What::Sync, 1);
    rig.client(1, 1000);
    rig.sim.clients[0].habits.fua = 1000;
    rig.rest();
    let marked = |rig: &Rig| rig.sim.shards[rig.shard].marked_files();
    assert_eq!((rig.state(), marked(&rig)), (DiskState::StorageError, 1));
    rig.tell(Kind::Fail);
    rig.tell(Kind::ResumeInDoubt);
    assert_eq!((rig.count("ResumeInDoubt refused: WrongState"), marked(&rig)), (1, 1));
    assert_eq!(rig.sim.disks[0].counters.data_in_doubt.get(), 0);
}

#[test]
fn a_resume_in_doubt_waits_until_the_tables_are_durable_again() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    rig.plot(1, What::Sync, 1);
    rig.client(3, 1000);
    rig.sim.clients[0].habits.fua = 1000;
    rig.rest();
    assert_eq!(rig.state(), DiskState::StorageError);
    // The flush of what was written again fails, too: nothing is accepted.
    rig.plot(1, What::Sync, 1);
    rig.tell(Kind::ResumeInDoubt);
    assert_eq!(rig.count("ResumeInDoubt refused: Failed"), 1);
    assert_eq!((rig.state(), rig.sim.shards[rig.shard].marked_files()), (DiskState::StorageError, 1));
    rig.tell(Kind::Resume);
    assert_eq!(rig.count("Resume refused: DataInDoubt"), 1);
    rig.tell(Kind::ResumeInDoubt);
    assert_eq!((rig.count("ResumeInDoubt"), rig.state()), (1, DiskState::Running));
    let failed = rig.count("change failed");
    rig.client(20, 500);
    rig.rest();
    assert_eq!(rig.count("change failed") + rig.count("read failed"), failed);
}

#[test]
fn a_command_that_waits_for_a_read_is_woken_by_its_end() {
    let mut rig = Rig::new(1, ErrorPolicy::Report);
    rig.client(30, 1000);
    rig.rest();
    // Its place is known, so nothing but memory says that it is read.
    rig.client(1, 0);
    rig.step_until(|rig| rig.sim.world.borrow().is_busy(0));
    rig.resize(SIZE * 2);
    rig.rest();
    assert_eq!((rig.count("read done"), rig.count("Resize")), (1, 1));
}

/// Goal: a future that could go on for ever does not keep its shard. Method: one that yields, and turns are counted.
#[test]
fn a_future_that_yields_goes_on_in_the_next_turn() {
    use futures_lite::future::yield_now;
    const ROUNDS: u32 = 50;
    let mut rig = Rig::new(0, ErrorPolicy::Report);
    let shard = &mut rig.sim.shards[0];
    shard.start_tool(&[], |_, _| {
        Box::pin(async {
            for _ in 0..ROUNDS {
                yield_now().await;
            }
            Ok(())
        })
    });
    let mut turns = 0;
    while shard.tool_runs() {
        shard.turn().expect("it has something to do");
        turns += 1;
    }
    assert!((ROUNDS..ROUNDS + 3).contains(&turns), "{turns} turns");
}
