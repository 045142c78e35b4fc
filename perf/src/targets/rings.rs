//! The targets of disks that are reached through rings in shared memory.

use super::{Judge, TargetResult, Verdict, Wanted, ratio};
use crate::cases::{blkif, rings, single};
use crate::report::{Metric, Row};
use crate::servers::Kind;

fn peer(row: &Row) -> bool {
    row.server == Kind::QemuStorageDaemon.name()
}

fn limit(row: &Row) -> bool {
    row.server == blkif::LIMIT
}

impl Judge<'_> {
    /// Judges the case `blkif`.
    pub(super) fn rings(&self, results: &mut Vec<TargetResult>) {
        self.rings_in_memory(results);
        for (points, cpu, iops) in [
            ([&single::READ_4K_QD32, &single::WRITE_4K_QD32], Some(1.15), 0.95),
            ([&blkif::READ_4K_QD128, &blkif::WRITE_4K_QD128], None, 0.9),
            ([&blkif::READ_1M_QD8, &blkif::WRITE_1M_QD8], None, 0.95),
        ] {
            for point in points {
                let point = point.name();
                let mut judge = |metric: Metric, wanted: Wanted| {
                    let ours = self.ours(blkif::RAW, &point, &blkif::raw(), metric);
                    let file = self.best(blkif::RAW, &point, metric, limit);
                    let name = format!("blkif raw {point}: {} to fio on the file", metric.title());
                    results.push(ratio(name, wanted, ours, file));
                };
                if let Some(cpu) = cpu {
                    judge(Metric::CpuPerMillion, Wanted::AtMost(cpu));
                }
                judge(Metric::Iops, Wanted::AtLeast(iops));
            }
        }
        for point in [&single::READ_4K_QD1, &single::WRITE_4K_QD1] {
            let point = point.name();
            let ours = self.ours(blkif::RAW, &point, &blkif::raw(), Metric::P50Us);
            let theirs = self.best(blkif::RAW, &point, Metric::P50Us, peer);
            let name = format!("blkif raw {point}: p50 to vhost-user-blk's better");
            results.push(ratio(name, Wanted::AtMost(0.75), ours, theirs));
        }
    }

    /// Many rings of one process beside a process for each disk.
    pub(super) fn many_rings(&self, results: &mut Vec<TargetResult>) {
        let point = rings::point(rings::JUDGED);
        let metric = Metric::CpuPerMillion;
        let ours = self.ours(rings::CASE, &point, &rings::subject(), metric);
        let theirs = self.best(rings::CASE, &point, metric, |row| row.variant.starts_with(rings::PER_DISK));
        let name = format!("blkif {point}: {} to a process per disk", metric.title());
        let mut result = ratio(name, Wanted::AtMost(0.5), ours, theirs);
        let late = |row: &Row| *row == rings::subject() || row.variant.starts_with(rings::PER_DISK);
        let late = self.rows(rings::CASE, &point).filter(|summary| late(&summary.row));
        let late: f64 = late.filter_map(|summary| summary.value(Metric::Unanswered)).sum();
        if late > 0.0 {
            // An open loop that the machine does not keep up with: both rows are another load than was asked for.
            result.verdict = Verdict::NotMeasured;
            result.note =
                format!("{late} requests were not answered in time: this machine cannot carry the load");
        }
        results.push(result);
    }

    /// Operations per second of server CPU are the inverse of CPU per operation, so the division is the other way round.
    fn rings_in_memory(&self, results: &mut Vec<TargetResult>) {
        let metric = Metric::CpuPerMillion;
        for point in [&single::READ_4K_QD32, &single::WRITE_4K_QD32] {
            let point = point.name();
            let ours = self.ours(blkif::MEMORY, &point, &blkif::null(), metric);
            let theirs =
                self.best(blkif::MEMORY, &point, metric, |row| peer(row) && row.variant == blkif::PEER_NULL);
            let name = format!("blkif null {point}: IOPS per CPU second to vhost-user-blk's null-co");
            results.push(ratio(name, Wanted::AtLeast(1.2), theirs, ours));
            let verified = self.report.verified.contains(&format!("{}: {}", blkif::MEMORY, blkif::ram()));
            let ours = self.ours(blkif::MEMORY, &point, &blkif::ram(), metric).filter(|_| verified);
            let theirs = self.best(blkif::MEMORY, &point, metric, |row| {
                peer(row) && row.variant.starts_with(blkif::PEER_MEMORY)
            });
            let name = format!("blkif RAM {point}: IOPS per CPU second to vhost-user-blk's file on tmpfs");
            results.push(ratio(name, Wanted::AtLeast(1.2), theirs, ours));
        }
        for point in [&single::READ_4K_QD1, &single::WRITE_4K_QD1] {
            let point = point.name();
            let ours = self.ours(blkif::MEMORY, &point, &blkif::null(), Metric::P50Us);
            let theirs = self.best(blkif::MEMORY, &point, Metric::P50Us, |row| {
                peer(row) && row.variant == blkif::PEER_NULL
            });
            let name = format!("blkif null {point}: p50 to vhost-user-blk's null-co");
            results.push(ratio(name, Wanted::AtMost(0.75), ours, theirs));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::judge;
    use super::*;
    use crate::report::Report;
    use crate::report::tests::{report, sample};

    // Goal: IOPS per CPU second is their CPU divided by ours, and RAM counts only when its data were verified.
    // Method: we take half of the peer's CPU; the same report without and with the note.
    #[test]
    fn cpu_is_judged_the_other_way_round() {
        let point = single::READ_4K_QD32.name();
        let row = |variant: &str| Row::new(Kind::QemuStorageDaemon, variant);
        let cpu = |row: Row, value| sample(blkif::MEMORY, &point, row, &[(Metric::CpuPerMillion, value)]);
        let mut found = report(vec![
            cpu(blkif::null(), 1.0),
            cpu(row(blkif::PEER_NULL), 2.0),
            cpu(blkif::ram(), 1.0),
            cpu(row(&format!("{}, aio=threads", blkif::PEER_MEMORY)), 8.0),
            cpu(row(&format!("{}, aio=io_uring", blkif::PEER_MEMORY)), 1.1),
        ]);
        let verdicts = |found: &Report| {
            let results = judge(found, &[blkif::CASE]);
            let of = |what: &str| {
                let target =
                    results.iter().find(|result| result.name.starts_with(&format!("blkif {what} {point}")));
                target.map(|target| (target.measured, target.verdict))
            };
            (of("null"), of("RAM"))
        };
        let null = Some((Some(2.0), Verdict::Met));
        assert_eq!(verdicts(&found), (null, Some((None, Verdict::NotMeasured))));
        found.verified.push(format!("{}: {}", blkif::MEMORY, blkif::ram()));
        assert_eq!(verdicts(&found), (null, Some((Some(1.1), Verdict::Missed))));
    }
    // Goal: many rings are judged only when every request of the open loop was answered, on both sides.
    // Method: the same figures, with a request missing on neither side, on ours, on theirs.
    #[test]
    fn an_open_loop_that_was_late_is_not_judged() {
        let point = rings::point(rings::JUDGED);
        let peer = Row::new(Kind::QemuStorageDaemon, rings::PER_DISK);
        for (ours, theirs, verdict) in
            [(0.0, 0.0, Verdict::Met), (1.0, 0.0, Verdict::NotMeasured), (0.0, 1.0, Verdict::NotMeasured)]
        {
            let row = |row: Row, cpu, late| {
                let values = [(Metric::CpuPerMillion, cpu), (Metric::Unanswered, late)];
                sample(rings::CASE, &point, row, &values)
            };
            let found = report(vec![row(rings::subject(), 1.0, ours), row(peer.clone(), 4.0, theirs)]);
            let results = judge(&found, &[rings::CASE]);
            assert_eq!(results.iter().map(|result| result.verdict).collect::<Vec<_>>(), [verdict]);
        }
    }
}
