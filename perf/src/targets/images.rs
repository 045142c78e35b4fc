//! The targets of the cases with qcow2, VHD and VMDK images.

use super::{Judge, TargetResult, Wanted, plain, ratio};
use crate::cases::{alloc, chain, cold, convert, density, encrypted, formats, idle, single};
use crate::report::{Metric, Row};
use crate::servers::{Format, Kind};

/// Reads of what an image has only once (the first level of its tables) are shared by all reads of the `cold` case.
const ONCE: f64 = 0.05;

fn storage_daemon(row: &Row) -> bool {
    row.server == Kind::QemuStorageDaemon.name()
}

impl Judge<'_> {
    /// Judges those of `cases` that are about images.
    pub(super) fn images(&self, cases: &[&str], results: &mut Vec<TargetResult>) {
        if cases.contains(&formats::CASE) {
            self.formats(results);
        }
        if cases.contains(&encrypted::CASE) {
            self.encrypted(results);
        }
        if cases.contains(&alloc::CASE) {
            self.alloc(results);
        }
        if cases.contains(&chain::CASE) {
            self.chain(results);
        }
        if cases.contains(&convert::CASE) {
            self.convert(results);
        }
        if cases.contains(&idle::CASE) {
            self.idle(results);
        }
        if cases.contains(&cold::CASE) {
            self.cold(results);
        }
    }

    fn formats(&self, results: &mut Vec<TargetResult>) {
        for format in formats::FORMATS {
            let case = formats::case_of(format);
            for point in &single::POINTS {
                let point = point.name();
                for (metric, wanted) in
                    [(Metric::Iops, Wanted::AtLeast(0.95)), (Metric::CpuPerMillion, Wanted::AtMost(1.1))]
                {
                    let ours = self.ours(case, &point, &formats::subject(format), metric);
                    let raw = self.ours(case, &point, &formats::raw(), metric);
                    let name = format!("{} {point}: {} to our raw", format.name(), metric.title());
                    results.push(ratio(name, wanted, ours, raw));
                }
                // QEMU's driver does one request after the other.
                if format == Format::Vmdk && point == single::WRITE_4K_QD32.name() {
                    let ours = self.ours(case, &point, &formats::subject(format), Metric::Iops);
                    let theirs = self.best(case, &point, Metric::Iops, storage_daemon);
                    let name = format!("vmdk {point}: IOPS to QEMU's better");
                    results.push(ratio(name, Wanted::AtLeast(3.0), ours, theirs));
                }
            }
        }
    }

    fn encrypted(&self, results: &mut Vec<TargetResult>) {
        for point in encrypted::IN_MEMORY {
            let blocks = self.ours(encrypted::CASE, point, &encrypted::subject(), Metric::Iops);
            let gigabytes = blocks.map(|(blocks, _)| blocks * encrypted::BLOCK_BYTES as f64 / 1e9);
            let name = format!("encrypted: {point}, GB/s on one core");
            results.push(plain(name, Wanted::AtLeast(1.0), gigabytes, String::new()));
        }
        let point = single::READ_4K_QD32.name();
        let ours = self.ours(encrypted::CASE, &point, &encrypted::subject(), Metric::Iops);
        let raw = self.ours(encrypted::CASE, &point, &formats::raw(), Metric::Iops);
        results.push(ratio(format!("encrypted {point}: IOPS to our raw"), Wanted::AtLeast(0.6), ours, raw));
    }

    fn alloc(&self, results: &mut Vec<TargetResult>) {
        for point in alloc::Point::ALL {
            let wanted = match point {
                alloc::Point::Qcow2 | alloc::Point::Qcow2Backed => 2.0,
                alloc::Point::Vhd => 5.0,
                alloc::Point::Vmdk => 10.0,
            };
            let ours = self.ours(alloc::CASE, point.name(), &alloc::subject(), Metric::Iops);
            let theirs = self.best(alloc::CASE, point.name(), Metric::Iops, storage_daemon);
            let name = format!("alloc {}: IOPS to QEMU's better", point.name());
            results.push(ratio(name, Wanted::AtLeast(wanted), ours, theirs));
        }
    }

    fn chain(&self, results: &mut Vec<TargetResult>) {
        for point in &chain::POINTS {
            let point = point.name();
            let deep = self.ours(chain::CASE, &point, &chain::deep(), Metric::Iops);
            let flat = self.ours(chain::CASE, &point, &chain::flat(), Metric::Iops);
            results.push(ratio(format!("chain {point}: IOPS to flat"), Wanted::AtLeast(0.9), deep, flat));
        }
    }

    fn convert(&self, results: &mut Vec<TargetResult>) {
        for point in [convert::RAW_TO_QCOW2, convert::QCOW2_TO_RAW] {
            let ours = |metric| self.ours(convert::CASE, point, &convert::subject(), metric);
            let theirs = |metric| self.ours(convert::CASE, point, &convert::peer(), metric);
            // The target is a speed-up, so time is judged the other way round.
            results.push(ratio(
                format!("convert {point}: times faster"),
                Wanted::AtLeast(1.3),
                theirs(Metric::WallMs),
                ours(Metric::WallMs),
            ));
            results.push(ratio(
                format!("convert {point}: CPU to qemu-img"),
                Wanted::AtMost(1.0),
                ours(Metric::CpuMs),
                theirs(Metric::CpuMs),
            ));
        }
    }

    fn idle(&self, results: &mut Vec<TargetResult>) {
        for point in [density::idle(idle::DISKS), density::connected(idle::DISKS)] {
            let pss = self.ours(idle::CASE, &point, &idle::subject(), Metric::PssPerDiskKib);
            let name = format!("qcow2, {point}: PSS KiB per disk");
            results.push(plain(name, Wanted::AtMost(96.0), pss.map(|(value, _)| value), String::new()));
        }
    }

    fn cold(&self, results: &mut Vec<TargetResult>) {
        for (format, reads) in [(Format::Qcow2, 1.0), (Format::Vhd, 2.0)] {
            let point = cold::point(format);
            let ours = self.ours(cold::CASE, &point, &cold::subject(), Metric::MetadataReads);
            let wanted = Wanted::AtMost(reads + ONCE);
            let name = format!("cold {point}: metadata reads per read");
            results.push(plain(name, wanted, ours.map(|(value, _)| value), String::new()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Verdict, judge};
    use super::*;
    use crate::report::tests::{report, sample};

    // Goal: a speed-up is their time divided by ours, and CPU ours divided by theirs. Method: we take half the time and twice the CPU.
    #[test]
    fn faster_is_less_time() {
        let point = convert::RAW_TO_QCOW2;
        let values = |wall, cpu| [(Metric::WallMs, wall), (Metric::CpuMs, cpu)];
        let report = report(vec![
            sample(convert::CASE, point, convert::subject(), &values(500.0, 40.0)),
            sample(convert::CASE, point, convert::peer(), &values(1000.0, 20.0)),
        ]);
        let results = judge(&report, &[convert::CASE]);
        assert_eq!((results[0].measured, results[0].verdict), (Some(2.0), Verdict::Met));
        assert_eq!((results[1].measured, results[1].verdict), (Some(2.0), Verdict::Missed));
        assert_eq!(results[2].verdict, Verdict::NotMeasured);
    }

    // Goal: an image is compared with our raw row of the same case, never with the peer's. Method: one point of one format.
    #[test]
    fn formats_are_judged_by_our_raw() {
        let case = formats::case_of(Format::Vhd);
        let point = single::READ_4K_QD1.name();
        let report = report(vec![
            sample(case, &point, formats::subject(Format::Vhd), &[(Metric::Iops, 90.0)]),
            sample(case, &point, formats::raw(), &[(Metric::Iops, 100.0)]),
            sample(case, &point, Row::new(Kind::QemuStorageDaemon, "vpc"), &[(Metric::Iops, 10.0)]),
        ]);
        let results = judge(&report, &[formats::CASE]);
        let judged = results.iter().find(|result| result.measured.is_some());
        assert_eq!(judged.map(|result| result.verdict), Some(Verdict::Missed));
        let points = single::POINTS.len() * formats::FORMATS.len();
        assert_eq!(results.len(), 2 * points + 1, "two figures for each, and one beside QEMU");
    }
}
