//! The simulated store of a test: files, operations in flight, and one seed that decides in which order they complete.
//!
//! Nothing completes by itself: [`Store::step`] completes one operation, [`Store::run`] drives futures and steps until they have
//! ended. An operation is the kernel's from the moment its future was made; dropping the future changes nothing for it.
//!
//! It watches the contract of [`crate::file`] as well: what breaks it (a change through a file that was opened read-only, an
//! offset that no file can have, a read of unreasonable size) is refused *and* noted in [`Store::violations`]. Changes in flight
//! that overlap are legal and counted ([`Store::overlaps`]).

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::task::Waker;

use super::fault::{Fault, Kind, Landed, Op, Rule};
use super::log::MemLog;
use super::mem_file::MemFile;
use super::pages::{LENGTH_MAX_BYTES, Pages};
use super::record::{Change, Event, Record};
use super::run::{Task, Tasks};
use crate::error::Error;
use crate::file::Buf;

/// The longest single read that a driver may ask for, in bytes; more is memory that an image can make us take.
pub const READ_MAX_BYTES: usize = 64 << 20;

/// Polls and completions that a store allows unless told otherwise: a test needs far fewer.
pub const TURNS_MAX: u64 = 3_000_000;

/// Why futures were given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stuck {
    /// Tasks wait, and nothing is in flight that could wake them (held operations are listed).
    Deadlock(Vec<Op>),
    /// More turns than [`Store::set_turns_max`] allows: an endless loop.
    Budget,
}

/// Picks operations.
type Filter = Box<dyn Fn(&Op) -> bool>;

/// What is told to who waits for an operation.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) result: RefCell<Option<Result<Buf, Error>>>,
    pub(super) waker: RefCell<Option<Waker>>,
}

/// What an operation is to do.
#[derive(Debug)]
pub(super) enum Action {
    Read(Range<u64>),
    Change(Change),
}

#[derive(Debug)]
struct InFlight {
    op: Op,
    action: Action,
    fault: Option<Fault>,
    /// Number of completions before which this one does not complete.
    not_before: u64,
    /// errno of the first flush that failed, of the object that it was made through.
    failed_flush: Rc<Cell<Option<i32>>>,
    answer: Rc<Answer>,
}

#[derive(Debug)]
struct File {
    name: String,
    pages: Pages,
}

/// See the module.
pub struct Store {
    seed: u64,
    rng: RefCell<fastrand::Rng>,
    files: RefCell<Vec<File>>,
    in_flight: RefCell<Vec<InFlight>>,
    rules: RefCell<Vec<Rule>>,
    hold: RefCell<Option<Filter>>,
    in_order: Cell<bool>,
    at_once: Cell<bool>,
    space_max_bytes: Cell<u64>,
    turns_left: Cell<u64>,
    submitted: Cell<u64>,
    completed: Cell<u64>,
    faults: Cell<u64>,
    overlaps: Cell<u64>,
    violations: RefCell<Vec<String>>,
    record: RefCell<Option<Record>>,
    logs: RefCell<Vec<Rc<MemLog>>>,
}

impl Store {
    /// A store without files. Operations complete in an order that `seed` decides.
    pub fn new(seed: u64) -> Rc<Store> {
        Rc::new(Store {
            seed,
            rng: RefCell::new(fastrand::Rng::with_seed(seed)),
            files: RefCell::default(),
            in_flight: RefCell::default(),
            rules: RefCell::default(),
            hold: RefCell::default(),
            in_order: Cell::new(false),
            at_once: Cell::new(false),
            space_max_bytes: Cell::new(u64::MAX),
            turns_left: Cell::new(TURNS_MAX),
            submitted: Cell::new(0),
            completed: Cell::new(0),
            faults: Cell::new(0),
            overlaps: Cell::new(0),
            violations: RefCell::default(),
            record: RefCell::default(),
            logs: RefCell::default(),
        })
    }

    /// The seed, for messages.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Adds a file and opens it writable.
    pub fn add(self: &Rc<Self>, name: &str, pages: Pages) -> Rc<MemFile> {
        assert!(self.record.borrow().is_none(), "files are added before the recording begins");
        let mut files = self.files.borrow_mut();
        files.push(File { name: name.to_string(), pages });
        MemFile::new(self.clone(), files.len() - 1, name, true)
    }

    /// Opens a file once more: a new object, which knows nothing of flushes that failed through others.
    pub fn open(self: &Rc<Self>, file: usize, writable: bool) -> Rc<MemFile> {
        let name = self.files.borrow()[file].name.clone();
        MemFile::new(self.clone(), file, &name, writable)
    }

    /// An allocation log with room for `capacity` entries, holding `entries`.
    pub fn add_log(self: &Rc<Self>, capacity: usize) -> Rc<MemLog> {
        assert!(self.record.borrow().is_none(), "logs are added before the recording begins");
        let mut logs = self.logs.borrow_mut();
        let log = MemLog::new(Rc::downgrade(self), logs.len(), capacity);
        logs.push(log.clone());
        log
    }

    /// A copy of what a file holds now.
    pub fn pages(&self, file: usize) -> Pages {
        self.files.borrow()[file].pages.clone()
    }

    /// The name of a file.
    pub fn name(&self, file: usize) -> String {
        self.files.borrow()[file].name.clone()
    }

    /// Changes what a file holds, behind everybody's back.
    pub fn alter(&self, file: usize, change: impl FnOnce(&mut Pages)) {
        change(&mut self.files.borrow_mut()[file].pages);
    }

    /// Length of a file in bytes.
    pub fn length(&self, file: usize) -> u64 {
        self.files.borrow()[file].pages.length()
    }

    pub(super) fn is_device(&self, file: usize) -> bool {
        self.files.borrow()[file].pages.is_device()
    }

    /// Operations complete in the order in which they were submitted.
    pub fn complete_in_order(&self) {
        self.in_order.set(true);
    }

    /// Operations complete when they are submitted, so that futures over the files never wait; what breaks the contract of
    /// [`crate::file`] fails the test at once.
    pub fn done_at_once(&self) {
        self.at_once.set(true);
    }

    /// All files together hold at most this much; writes beyond it fail with ENOSPC.
    pub fn set_space_max(&self, bytes: u64) {
        self.space_max_bytes.set(bytes);
    }

    /// Space that all files take now, in bytes.
    pub fn allocated_bytes(&self) -> u64 {
        self.files.borrow().iter().map(|file| file.pages.allocated_bytes()).sum()
    }

    /// The polls and completions that are allowed from now on, before [`Store::try_run`] gives up.
    pub fn set_turns_max(&self, turns: u64) {
        self.turns_left.set(turns);
    }

    /// Adds a rule by which operations go wrong, for operations that are submitted from now on.
    pub fn inject(&self, rule: Rule) {
        self.rules.borrow_mut().push(rule);
    }

    /// Forgets all rules.
    pub fn heal(&self) {
        self.rules.borrow_mut().clear();
    }

    /// Operations for which `which` is true do not complete until [`Store::release`].
    pub fn hold(&self, which: impl Fn(&Op) -> bool + 'static) {
        *self.hold.borrow_mut() = Some(Box::new(which));
    }

    /// Ends [`Store::hold`].
    pub fn release(&self) {
        *self.hold.borrow_mut() = None;
    }

    /// Operations that have not completed.
    pub fn in_flight(&self) -> Vec<Op> {
        self.in_flight.borrow().iter().map(|flight| flight.op.clone()).collect()
    }

    /// Operations that were ever submitted.
    pub fn submitted(&self) -> u64 {
        self.submitted.get()
    }

    /// Operations that a rule or the lack of space made fail.
    pub fn faults(&self) -> u64 {
        self.faults.get()
    }

    /// What broke the contract of [`crate::file`].
    pub fn violations(&self) -> Vec<String> {
        self.violations.borrow().clone()
    }

    /// Changes that were submitted while another one of the same bytes was in flight.
    pub fn overlaps(&self) -> u64 {
        self.overlaps.get()
    }

    /// Begins to record; what the files and logs hold now counts as durable.
    pub fn start_record(&self) {
        assert!(self.in_flight.borrow().is_empty(), "a recording begins while nothing is in flight");
        let initial = self.files.borrow().iter().map(|file| file.pages.clone()).collect();
        let logs = self.logs.borrow().iter().map(|log| log.state()).collect();
        *self.record.borrow_mut() = Some(Record { initial, logs, events: Vec::new() });
    }

    /// Ends the recording.
    pub fn take_record(&self) -> Record {
        self.record.borrow_mut().take().unwrap_or_default()
    }

    /// Notes a moment; answers with its place in the record, 0 when nothing is recorded.
    pub fn mark(&self) -> usize {
        self.note(Event::Mark)
    }

    pub(super) fn note(&self, event: Event) -> usize {
        let mut record = self.record.borrow_mut();
        let Some(record) = record.as_mut() else { return 0 };
        record.events.push(event);
        record.events.len() - 1
    }

    pub(super) fn submit(&self, file: &MemFile, kind: Kind, action: Action) -> Rc<Answer> {
        let range = match &action {
            Action::Read(range) | Action::Change(Change::Zero(range)) => range.clone(),
            Action::Change(Change::Write { offset, data }) => {
                *offset..offset.saturating_add(data.len() as u64)
            }
            Action::Change(Change::Extend(length) | Change::Truncate(length)) => 0..*length,
            Action::Change(_) => 0..0,
        };
        let op = Op { id: self.submitted.get(), file: file.file(), kind, range };
        self.submitted.set(op.id + 1);
        let mut fault = None;
        for rule in self.rules.borrow_mut().iter_mut() {
            fault = fault.or(rule.judge(&op));
        }
        if let Some(errno) = self.refuses(file, &op) {
            fault = Some(Fault::Fails { errno, landed: Landed::Nothing });
        }
        self.count_overlap(&op);
        if let Action::Change(change) = &action {
            self.note(Event::Submit { op: op.id, file: op.file, change: change.clone() });
        }
        let slow = match fault {
            Some(Fault::Slow(others)) => others,
            _ => 0,
        };
        let answer = Rc::new(Answer::default());
        self.in_flight.borrow_mut().push(InFlight {
            op,
            action,
            fault: fault.filter(|fault| !matches!(fault, Fault::Slow(_))),
            not_before: self.completed.get() + slow,
            failed_flush: file.failed_flush(),
            answer: answer.clone(),
        });
        if self.at_once.get() {
            self.step();
        }
        answer
    }

    /// The errno with which an operation is refused that no correct caller makes (noted), or that the file cannot serve.
    fn refuses(&self, file: &MemFile, op: &Op) -> Option<i32> {
        let name = file.label();
        let violation = |what: &str| {
            let line = format!("{name}: {what}: {op:?}");
            assert!(!self.at_once.get(), "{line}");
            self.violations.borrow_mut().push(line);
        };
        if op.kind != Kind::Read && op.kind != Kind::Flush && !file.may_write() {
            violation("change through a file that was opened read-only");
            return Some(9);
        }
        if op.range.end < op.range.start || op.range.end > i64::MAX as u64 {
            violation("range that no file can have");
            return Some(22);
        }
        if op.kind == Kind::Read && op.range.end - op.range.start > READ_MAX_BYTES as u64 {
            violation("read of unreasonable size");
            return Some(12);
        }
        let grows = matches!(op.kind, Kind::Write | Kind::Extend);
        if grows && self.is_device(op.file) && op.range.end > self.length(op.file) {
            return Some(28);
        }
        (grows && op.range.end > LENGTH_MAX_BYTES).then_some(27)
    }

    fn count_overlap(&self, op: &Op) {
        let changes = |op: &Op| matches!(op.kind, Kind::Write | Kind::Zero) && !op.range.is_empty();
        let meets = |other: &InFlight| {
            let other = &other.op;
            let apart = other.range.end <= op.range.start || op.range.end <= other.range.start;
            changes(other) && other.file == op.file && !apart
        };
        if changes(op) && self.in_flight.borrow().iter().any(meets) {
            self.overlaps.set(self.overlaps.get() + 1);
        }
    }

    /// Completes one operation; false when none may complete.
    pub fn step(&self) -> bool {
        let Some(chosen) = self.choose() else { return false };
        let flight = self.in_flight.borrow_mut().remove(chosen);
        let result = match flight.action {
            Action::Read(ref range) => self.read(&flight, range.clone()),
            Action::Change(ref change) => self.change(&flight, change),
        };
        self.completed.set(self.completed.get() + 1);
        *flight.answer.result.borrow_mut() = Some(result);
        if let Some(waker) = flight.answer.waker.borrow_mut().take() {
            waker.wake();
        }
        true
    }

    fn choose(&self) -> Option<usize> {
        let in_flight = self.in_flight.borrow();
        let hold = self.hold.borrow();
        let held = |op: &Op| hold.as_ref().is_some_and(|hold| hold(op));
        let free: Vec<usize> = (0..in_flight.len()).filter(|number| !held(&in_flight[*number].op)).collect();
        let due = |number: &usize| in_flight[*number].not_before <= self.completed.get();
        let ready: Vec<usize> = free.iter().copied().filter(due).collect();
        // When only slow ones are left, the least slow one is next.
        if ready.is_empty() {
            return free.into_iter().min_by_key(|number| in_flight[*number].not_before);
        }
        if self.in_order.get() { ready.first().copied() } else { self.rng.borrow_mut().choice(ready) }
    }

    fn read(&self, flight: &InFlight, range: Range<u64>) -> Result<Buf, Error> {
        if let Some(Fault::Fails { errno, .. }) = flight.fault {
            return Err(self.fault(&flight.op, errno));
        }
        let mut buf = Buf::zeroed((range.end - range.start) as usize);
        self.files.borrow()[flight.op.file].pages.read(range.start, &mut buf);
        Ok(buf)
    }

    fn change(&self, flight: &InFlight, change: &Change) -> Result<Buf, Error> {
        let op = &flight.op;
        let mut fault = match flight.fault {
            Some(Fault::Fails { errno, landed }) => Some((errno, landed)),
            _ => None,
        };
        if op.kind == Kind::Flush {
            let failed = flight.failed_flush.get().or(fault.map(|(errno, _)| errno));
            flight.failed_flush.set(failed);
            fault = failed.map(|errno| (errno, Landed::Nothing));
        }
        if fault.is_none() && op.kind == Kind::Write && !self.has_room(op) {
            fault = Some((28, Landed::Part));
        }
        let landed = match fault {
            None | Some((_, Landed::All)) => change.clone(),
            Some((_, Landed::Part)) if op.kind == Kind::Write && self.has_room(op) => {
                change.torn(&mut self.rng.borrow_mut())
            }
            Some(_) => Change::Pieces(Vec::new()),
        };
        landed.apply(&mut self.files.borrow_mut()[op.file].pages);
        let differs = (landed != *change).then_some(landed);
        self.note(Event::Complete { op: op.id, ok: fault.is_none(), landed: differs });
        match fault {
            Some((errno, _)) => Err(self.fault(op, errno)),
            None => Ok(Buf::zeroed(0)),
        }
    }

    fn has_room(&self, op: &Op) -> bool {
        let growth = self.files.borrow()[op.file].pages.growth_bytes(&op.range);
        growth == 0 || self.allocated_bytes() + growth <= self.space_max_bytes.get()
    }

    fn fault(&self, op: &Op, errno: i32) -> Error {
        self.faults.set(self.faults.get() + 1);
        let what = format!("{:?} of {:?}", op.kind, op.range);
        Error::io(&self.files.borrow()[op.file].name, what, errno)
    }

    /// Completes operations until none is left that may complete.
    pub fn settle(&self) {
        while self.step() {}
    }

    /// Drives one future to its end, completing operations meanwhile.
    ///
    /// # Errors
    /// It cannot end.
    pub fn try_run<T>(&self, future: impl Future<Output = T>) -> Result<T, Stuck> {
        let mut answer = None;
        let task: Task<'_> = Box::pin(async {
            answer = Some(future.await);
        });
        self.try_run_all(vec![task])?;
        answer.ok_or(Stuck::Budget)
    }

    /// As [`Store::try_run`], for a future that must end.
    ///
    /// # Panics
    /// It cannot end.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        match self.try_run(future) {
            Ok(answer) => answer,
            Err(stuck) => panic!("seed {}: {stuck:?}", self.seed),
        }
    }

    /// Drives several futures at a time to their ends.
    ///
    /// # Errors
    /// Not all of them can end.
    pub fn try_run_all(&self, tasks: Vec<Task<'_>>) -> Result<(), Stuck> {
        let mut rng = self.rng.borrow_mut().fork();
        let mut tasks = Tasks::new(tasks);
        while tasks.left() > 0 {
            let Some(turns) = self.turns_left.get().checked_sub(1) else { return Err(Stuck::Budget) };
            self.turns_left.set(turns);
            // Mostly the tasks go first; now and then several completions arrive before anybody looks.
            let step_first = !self.in_order.get() && rng.u8(..4) == 0;
            let progress = (step_first && self.step()) || tasks.turn(&mut rng) || self.step();
            if !progress {
                return Err(Stuck::Deadlock(self.in_flight()));
            }
        }
        Ok(())
    }

    /// As [`Store::try_run_all`], for futures that must end.
    ///
    /// # Panics
    /// Not all of them can end.
    pub fn run_all(&self, tasks: Vec<Task<'_>>) {
        if let Err(stuck) = self.try_run_all(tasks) {
            panic!("seed {}: {stuck:?}", self.seed);
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store(seed {}, {} files)", self.seed, self.files.borrow().len())
    }
}
