//! The standard metrics of a process, from /proc (proc(5)).

use prometheus::proto::{MetricFamily, MetricType};

use super::family::Family;

/// What is known about this process; what /proc does not tell is left out.
pub fn collect() -> Vec<MetricFamily> {
    let mut families = Vec::new();
    let mut add = |name: &str, help: &str, kind: MetricType, value: Option<f64>| {
        if let Some(value) = value {
            let mut family = Family::new(name, help, kind);
            family.value(&[], value);
            families.extend(family.finish());
        }
    };
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program stands in brackets and may hold anything; fields are counted behind it.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    // `number` as proc(5) counts.
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096) as f64;
    let cpu = field(14).zip(field(15)).map(|(user, system)| (user + system) / ticks);
    add("process_cpu_seconds_total", "User and system CPU time.", MetricType::COUNTER, cpu);
    add("process_threads", "Threads.", MetricType::GAUGE, field(20));
    add("process_virtual_memory_bytes", "Virtual memory.", MetricType::GAUGE, field(23));
    let resident = field(24).map(|pages| pages * page);
    add("process_resident_memory_bytes", "Resident memory.", MetricType::GAUGE, resident);
    let started = boot_time().zip(field(22)).map(|(boot, since)| boot + since / ticks);
    add("process_start_time_seconds", "Start of the process since 1970.", MetricType::GAUGE, started);
    add("process_open_fds", "Open descriptors.", MetricType::GAUGE, open_descriptors());
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok();
    add(
        "process_max_fds",
        "Descriptors that may be open.",
        MetricType::GAUGE,
        limit.map(|(soft, _)| soft as f64),
    );
    families
}

/// How many descriptors are open. Since Linux 6.2 the directory's size says it; before that its entries have to be counted.
fn open_descriptors() -> Option<f64> {
    const DIR: &str = "/proc/self/fd";
    match std::fs::metadata(DIR).ok()?.len() {
        0 => std::fs::read_dir(DIR).ok().map(|fds| fds.count() as f64),
        open => Some(open as f64),
    }
}

/// Start of the host in seconds since 1970.
fn boot_time() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::open_descriptors;

    /// Goal: descriptors are counted, however the kernel tells. Method: hold some more.
    #[test]
    fn descriptors_are_counted() {
        let before = open_descriptors().unwrap();
        let held: Vec<_> = (0..500).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        // Other tests of this process open and close some meanwhile.
        let more = open_descriptors().unwrap() - before;
        assert!((300.0..700.0).contains(&more), "{more} of {}", held.len());
    }
}
