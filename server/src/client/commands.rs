//! The commands of `ctl`: each is one request, and one way to print its answer.

use formats::spec::ImageSpec;
use hyper::Method;

use super::connection::{Connection, NO_BODY};
use super::{Failure, output, tables, top};
use crate::args::{AttachArgs, CtlArgs, CtlCommand, QosArgs};
use crate::model::{
    AttachRequest, ClaimRequest, Disk, DiskStats, Event, Group, Guest, GuestDevice, Image, MoveRequest,
    QosRequest, Reload, ResizeRequest, ResumeRequest, Shard, SnapshotItem, SnapshotRequest, Version,
};
use crate::problem::Problem;

/// Runs a command. The value is the exit code.
pub async fn run(args: CtlArgs) -> Result<u8, Failure> {
    let connection = Connection { socket: args.ctl, timeout_s: args.timeout };
    let json = args.json;
    match args.command {
        CtlCommand::Attach(attach) => attach_disk(&connection, *attach, json).await?,
        CtlCommand::Detach { name, force } => detach(&connection, &name, force, json).await?,
        CtlCommand::List => {
            let disks: Vec<Disk> = connection.get("/v1/disks").await?;
            show(json, &disks, |disks| tables::disks(disks))?;
        }
        CtlCommand::Show { name } => {
            let disk: Disk = connection.get(&disk_path(&name, "")?).await?;
            show(json, &disk, tables::disk)?;
        }
        CtlCommand::Stats { name } => {
            let stats: Vec<DiskStats> = match name {
                Some(name) => vec![connection.get(&disk_path(&name, "/stats")?).await?],
                None => connection.get("/v1/stats").await?,
            };
            show(json, &stats, |stats| tables::stats(stats))?;
        }
        CtlCommand::Qos(qos) => set_limits(&connection, *qos, json).await?,
        CtlCommand::Pause { name, release } => {
            let path = disk_path(&name, &format!("/pause?release={release}"))?;
            changed(json, &connection.change(Method::POST, &path, NO_BODY).await?)?;
        }
        CtlCommand::Resume { name, data_in_doubt, image } => {
            let path = disk_path(&name, "/resume")?;
            let image = image.map(|image| image_here(&image)).transpose()?;
            let body = ResumeRequest { data_in_doubt, image };
            changed(json, &connection.change(Method::POST, &path, Some(&body)).await?)?;
        }
        CtlCommand::Snapshot { disks } => {
            let body = SnapshotRequest { disks: snapshot_items(&disks)? };
            let disks: Vec<Disk> = connection.change(Method::POST, "/v1/snapshot", Some(&body)).await?;
            if json {
                output::json(&disks)?;
            }
        }
        CtlCommand::Fail { name } => {
            let path = disk_path(&name, "/fail")?;
            changed(json, &connection.change(Method::POST, &path, NO_BODY).await?)?;
        }
        CtlCommand::Resize { name, size } => {
            let path = disk_path(&name, "/resize")?;
            let body = ResizeRequest { size_bytes: size };
            changed(json, &connection.change(Method::POST, &path, Some(&body)).await?)?;
        }
        CtlCommand::Move { name, shard } => {
            let path = disk_path(&name, "/move")?;
            changed(json, &connection.change(Method::POST, &path, Some(&MoveRequest { shard })).await?)?;
        }
        CtlCommand::Guests => {
            let guests: Vec<GuestDevice> = connection.get("/v1/guests").await?;
            show(json, &guests, |guests| tables::guests(guests))?;
        }
        CtlCommand::Claim { xenbus_path } => {
            let body = ClaimRequest { xenbus_path };
            let disk: Disk = connection.change(Method::POST, "/v1/guests/claim", Some(&body)).await?;
            show(json, &disk, |disk| {
                disk.frontends
                    .iter()
                    .filter_map(|frontend| frontend.socket.as_ref())
                    .map(|path| format!("{path}\n"))
                    .collect()
            })?;
        }
        CtlCommand::Groups => {
            let groups: Vec<Group> = connection.get("/v1/groups").await?;
            show(json, &groups, |groups| tables::groups(groups))?;
        }
        CtlCommand::Shards => {
            let shards: Vec<Shard> = connection.get("/v1/shards").await?;
            show(json, &shards, |shards| tables::shards(shards))?;
        }
        CtlCommand::Top { interval, count } => top::run(&connection, interval, count, json).await?,
        CtlCommand::Events { after, limit } => {
            let path = format!("/v1/events?after={}&limit={}", after.unwrap_or(0), limit.unwrap_or(1024));
            let events: Vec<Event> = connection.get(&path).await?;
            show(json, &events, |events| tables::events(events))?;
        }
        CtlCommand::InjectPanic { name, shard } => {
            let path = match shard {
                Some(shard) => format!("/v1/shards/{shard}/inject-panic"),
                None => disk_path(&name.unwrap_or_default(), "/inject-panic")?,
            };
            connection.change::<serde_json::Value>(Method::POST, &path, NO_BODY).await?;
        }
        CtlCommand::Reload => {
            let report: Reload = connection.request(Method::POST, "/v1/reload", NO_BODY).await?;
            show(json, &report, tables::reload)?;
        }
        CtlCommand::Version => version(&connection, json).await?,
    }
    Ok(0)
}

fn show<T: serde::Serialize>(json: bool, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), Failure> {
    if json { output::json(value) } else { output::print(&table(value)) }
}

/// After a change nothing is printed but what was asked for.
fn changed(json: bool, disk: &Disk) -> Result<(), Failure> {
    if json { output::json(disk) } else { Ok(()) }
}

/// The path of a disk in the API. A name that cannot be is refused here, as it would not survive in a path.
fn disk_path(name: &str, rest: &str) -> Result<String, Failure> {
    formats::spec::check_disk_name(name).map_err(Problem::from)?;
    Ok(format!("/v1/disks/{name}{rest}"))
}

/// An image as it was typed. A relative path means the caller's directory, which the daemon does not know.
fn image_here(text: &str) -> Result<Image, Failure> {
    let here = std::env::current_dir().map_err(|error| Failure {
        message: format!("the current directory is unknown: {error}"),
        exit_code: 1,
    })?;
    Ok(Image::Parts(ImageSpec::parse_relative_to(text, &here).map_err(Problem::from)?))
}

/// `NAME TYPE:FILE`, or `NAME=TYPE:FILE` for each disk.
fn snapshot_items(arguments: &[String]) -> Result<Vec<SnapshotItem>, Failure> {
    let item = |disk: &str, image: &str| {
        formats::spec::check_disk_name(disk).map_err(Problem::from)?;
        Ok(SnapshotItem { disk: disk.to_owned(), image: image_here(image)? })
    };
    if let [name, image] = arguments
        && !name.contains('=')
    {
        return Ok(vec![item(name, image)?]);
    }
    let pairs = arguments.iter().map(|argument| match argument.split_once('=') {
        Some((name, image)) => item(name, image),
        None => Err(Problem::invalid(format!(
            "{argument:?} names no overlay: write NAME TYPE:FILE for one disk, or NAME=TYPE:FILE for each of several"
        ))
        .into()),
    });
    pairs.collect()
}

async fn attach_disk(connection: &Connection, args: AttachArgs, json: bool) -> Result<(), Failure> {
    let path = disk_path(&args.name, "")?;
    let request = AttachRequest {
        image: image_here(&args.image)?,
        read_only: args.read_only,
        nbd: args.nbd,
        blkif: args.blkif,
        guest: args.domain.zip(args.vdev).map(|(domain, vdev)| Guest { domain, vdev }),
        limits: args.limits,
        groups: args.group,
        on_error: args.on_error,
        on_enospc: args.on_enospc,
        shard: args.shard,
    };
    let disk: Disk = connection.change(Method::PUT, &path, Some(&request)).await?;
    show(json, &disk, |disk| {
        disk.frontends.iter().map(|frontend| format!("{}\n", frontend.uri)).collect::<String>()
    })
}

async fn detach(connection: &Connection, name: &str, force: bool, json: bool) -> Result<(), Failure> {
    let path = disk_path(name, &format!("?force={force}"))?;
    let left: Option<Disk> = connection.change(Method::DELETE, &path, NO_BODY).await?;
    if json {
        return output::json(&left);
    }
    if let Some(disk) = left {
        output::error(&format!(
            "disk {name} is detached, and listed as a zombie until the kernel's operations on it come back: {}",
            disk.reason.unwrap_or_default()
        ));
    }
    Ok(())
}

async fn set_limits(connection: &Connection, args: QosArgs, json: bool) -> Result<(), Failure> {
    let Some(name) = args.name else {
        let [group] = args.group.as_slice() else {
            return Err(
                Problem::invalid("limits are changed for one group at a time: give --group once").into()
            );
        };
        formats::spec::check_disk_name(group).map_err(|error| Problem::from(error).context("group"))?;
        let path = format!("/v1/groups/{group}");
        let group: Group = if args.limits.is_empty() {
            connection.get(&path).await?
        } else {
            connection.request(Method::PATCH, &path, Some(&args.limits)).await?
        };
        return show(json, &group, |group| tables::groups(std::slice::from_ref(group)));
    };
    // `--group ''` takes the disk out of all groups.
    let groups =
        (!args.group.is_empty()).then(|| args.group.into_iter().filter(|name| !name.is_empty()).collect());
    let disk: Disk = if args.limits.is_empty() && groups.is_none() {
        connection.get(&disk_path(&name, "")?).await?
    } else {
        let body = QosRequest { limits: args.limits, groups };
        connection.change(Method::PATCH, &disk_path(&name, "/qos")?, Some(&body)).await?
    };
    show(json, &disk, tables::limits_of_disk)
}

async fn version(connection: &Connection, json: bool) -> Result<(), Failure> {
    let daemon: Version = connection.get("/v1/version").await?;
    let client = env!("CARGO_PKG_VERSION");
    if json {
        return output::json(&serde_json::json!({ "client": client, "daemon": daemon }));
    }
    output::print(&format!(
        "client {client}\ndaemon {} (API {}, pid {}, up {})",
        daemon.version,
        daemon.api,
        daemon.pid,
        tables::duration(daemon.uptime_s)
    ))
}
