//! `ctl top`: a live view of disks and shards. In a terminal it redraws itself on the alternate screen; elsewhere it prints one
//! block after the other.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::connection::Connection;
use super::{Failure, output, tables};
use crate::model::{DiskStats, Quantiles, Shard};

/// Enters the alternate screen and hides the cursor (xterm control sequences).
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
/// Back, with the cursor.
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// To the first place of the screen.
const HOME: &str = "\x1b[H";
/// Clears the rest of a line, and of the screen.
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

/// Rates of one disk between two looks.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
struct Rates {
    name: String,
    state: &'static str,
    shard: Option<usize>,
    reads_per_s: f64,
    writes_per_s: f64,
    read_bytes_per_s: f64,
    written_bytes_per_s: f64,
    io_now: u64,
    throttled_now: u64,
    clients: u64,
    read_latency: Option<Quantiles>,
    write_latency: Option<Quantiles>,
}

/// Looks until interrupted, or `count` times.
pub async fn run(
    connection: &Connection,
    interval: f64,
    count: Option<u64>,
    json: bool,
) -> Result<(), Failure> {
    let screen = !json && std::io::stdout().is_terminal();
    if screen {
        output::print_raw(ENTER)?;
    }
    let result = look_repeatedly(connection, interval, count, json, screen).await;
    if screen {
        output::print_raw(LEAVE)?;
    }
    result
}

async fn look_repeatedly(
    connection: &Connection,
    interval: f64,
    count: Option<u64>,
    json: bool,
    screen: bool,
) -> Result<(), Failure> {
    let no_signal = |error: std::io::Error| Failure { message: format!("signals: {error}"), exit_code: 1 };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signal)?;
    let mut before: HashMap<String, DiskStats> = HashMap::new();
    let mut looks = 0;
    loop {
        let stats: Vec<DiskStats> = connection.get("/v1/stats").await?;
        let shards: Vec<Shard> = connection.get("/v1/shards").await?;
        let mut rates: Vec<Rates> = stats.iter().map(|now| between(before.get(&now.name), now)).collect();
        // The busiest first; the name decides among the idle.
        rates.sort_by(|a, b| {
            let load = |r: &Rates| r.reads_per_s + r.writes_per_s;
            load(b).total_cmp(&load(a)).then_with(|| a.name.cmp(&b.name))
        });
        if json {
            output::json(&serde_json::json!({ "disks": rates, "shards": shards }))?;
        } else if screen {
            output::print_raw(&fit_screen(&view(&rates, &shards)))?;
        } else {
            output::print(&format!("{}\n", view(&rates, &shards)))?;
        }
        before = stats.into_iter().map(|stats| (stats.name.clone(), stats)).collect();
        looks += 1;
        if count.is_some_and(|count| looks >= count) {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs_f64(interval)) => {}
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
    }
}

fn between(before: Option<&DiskStats>, now: &DiskStats) -> Rates {
    let seconds = before.map_or(0.0, |before| now.at_us.saturating_sub(before.at_us) as f64 / 1e6);
    let rate = |operation: &str, of: fn(&crate::model::OpTotals) -> u64| {
        let total = |stats: &DiskStats| stats.ops.get(operation).map_or(0, of);
        match before {
            // A disk that was detached and attached again starts from nothing.
            Some(before) if seconds > 0.0 => total(now).saturating_sub(total(before)) as f64 / seconds,
            _ => 0.0,
        }
    };
    Rates {
        name: now.name.clone(),
        state: now.state.name(),
        shard: now.shard,
        reads_per_s: rate("read", |op| op.completed),
        writes_per_s: rate("write", |op| op.completed),
        read_bytes_per_s: rate("read", |op| op.bytes),
        written_bytes_per_s: rate("write", |op| op.bytes),
        io_now: now.io_now,
        throttled_now: now.throttled_now,
        clients: now.clients,
        read_latency: now.latency.get("read").copied(),
        write_latency: now.latency.get("write").copied(),
    }
}

fn view(rates: &[Rates], shards: &[Shard]) -> String {
    let mut text = String::new();
    for shard in shards {
        let cpu = shard.cpu.map_or_else(|| "-".into(), |cpu| cpu.to_string());
        let _ = writeln!(
            text,
            "shard {} (CPU {cpu}, {}): {:5.1}% busy, {} disks, {} clients, {} operations in flight",
            shard.index,
            tables::shard_state(shard.state),
            shard.busy_ratio * 100.0,
            shard.disks,
            shard.clients,
            shard.ops_in_flight
        );
    }
    text.push('\n');
    text.push_str(&tables::rates(rates.iter().map(|r| {
        let [r50, r99, r999, rmax] = tables::latencies(r.read_latency.as_ref());
        let [w50, w99, w999, wmax] = tables::latencies(r.write_latency.as_ref());
        vec![
            r.name.clone(),
            r.state.into(),
            r.shard.map_or_else(|| "-".into(), |shard| shard.to_string()),
            format!("{:.0}", r.reads_per_s),
            format!("{:.0}", r.writes_per_s),
            format!("{:.1}", r.read_bytes_per_s / f64::from(1 << 20)),
            format!("{:.1}", r.written_bytes_per_s / f64::from(1 << 20)),
            r.io_now.to_string(),
            r.throttled_now.to_string(),
            format!("{r50}/{r99}/{r999}/{rmax}"),
            format!("{w50}/{w99}/{w999}/{wmax}"),
        ]
    })));
    text
}

/// The lines that fit the terminal, each cleared behind its end.
fn fit_screen(text: &str) -> String {
    let (columns, rows) = terminal_size();
    let mut screen = HOME.to_owned();
    for line in text.lines().take(rows.saturating_sub(1)) {
        screen.extend(line.chars().take(columns));
        screen.push_str(CLEAR_LINE);
        screen.push_str("\r\n");
    }
    screen.push_str(CLEAR_BELOW);
    screen
}

fn terminal_size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (80, 24),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: rates are differences over time, never negative. Method: known answers.

    use super::*;
    use crate::model::{OpTotals, State};

    fn look(at_us: u64, reads: u64) -> DiskStats {
        DiskStats {
            name: "d1".into(),
            state: State::Running,
            shard: Some(0),
            clients: 1,
            io_now: 0,
            throttled_now: 0,
            ops: [(
                "read".to_owned(),
                OpTotals { completed: reads, bytes: reads * 4096, ..OpTotals::default() },
            )]
            .into(),
            latency: Default::default(),
            at_us,
        }
    }

    #[test]
    fn rates_are_differences() {
        let rates = between(Some(&look(1_000_000, 100)), &look(3_000_000, 1100));
        assert_eq!((rates.reads_per_s, rates.read_bytes_per_s), (500.0, 2_048_000.0));
        assert_eq!(between(None, &look(1, 5)).reads_per_s, 0.0);
        assert_eq!(between(Some(&look(1, 500)), &look(2_000_000, 0)).reads_per_s, 0.0);
    }
}
