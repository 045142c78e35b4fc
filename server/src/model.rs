//! The words of the API: requests and answers, shared by the daemon (`http`) and its client (`client`), and described in
//! the OpenAPI document from these very types. Nothing here acts.

use std::borrow::Cow;
use std::collections::BTreeMap;

use formats::spec::ImageSpec;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use shard::api::DiskState;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{IntoParams, PartialSchema, ToSchema};

use crate::limit_change::LimitChange;
use crate::problem::Problem;

/// What names of disks and groups look like, for the description; [`formats::spec::check_disk_name`] is the rule.
pub const NAME_PATTERN: &str = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$";

/// What to do when the store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ErrorPolicy {
    /// Hold the request until `ctl resume` or `ctl fail`
    Pause,
    /// Answer the request with the error
    Report,
}

impl From<ErrorPolicy> for shard::api::ErrorPolicy {
    fn from(policy: ErrorPolicy) -> Self {
        match policy {
            ErrorPolicy::Pause => shard::api::ErrorPolicy::Pause,
            ErrorPolicy::Report => shard::api::ErrorPolicy::Report,
        }
    }
}

/// An image in a request: the string `TYPE:PATH?options`, or its parts. What it means is found out by [`Image::spec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Image {
    /// As a string.
    Text(String),
    /// In parts.
    Parts(ImageSpec),
}

impl Image {
    /// The image in parts, checked.
    pub fn spec(&self) -> Result<ImageSpec, Problem> {
        match self {
            Image::Text(text) => Ok(text.parse()?),
            Image::Parts(spec) => {
                spec.target()?;
                Ok(spec.clone())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Image {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Image, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Image;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(
                    "an image: \"raw:/srv/disk.img\" or {\"type\": \"raw\", \"path\": \"/srv/disk.img\"}",
                )
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Image, E> {
                Ok(Image::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Image, A::Error> {
                ImageSpec::deserialize(MapAccessDeserializer::new(map)).map(Image::Parts)
            }
        }
        from.deserialize_any(Either)
    }
}

impl PartialSchema for Image {
    fn schema() -> RefOr<Schema> {
        let text = || ObjectBuilder::new().schema_type(Type::String);
        let parts = ObjectBuilder::new()
            .description(Some("The same in parts; nothing is encoded."))
            .property("type", text().enum_values(Some(["raw", "ram", "null"])))
            .required("type")
            .property("path", text().description(Some("raw: an absolute path; ram: a name; null: empty")))
            .property(
                "options",
                ObjectBuilder::new()
                    .description(Some("Options of the type, as text: {\"size\": \"1G\"}"))
                    .additional_properties(Some(text())),
            )
            .additional_properties(Some(utoipa::openapi::schema::AdditionalProperties::<Schema>::FreeForm(
                false,
            )));
        OneOfBuilder::new()
            .description(Some("An image: TYPE:PATH?key=value&key=value, percent-encoded, or its parts."))
            .item(text().examples(["raw:/srv/disk.img", "ram:scratch?size=1G"]))
            .item(parts)
            .into()
    }
}

impl ToSchema for Image {
    fn name() -> Cow<'static, str> {
        "Image".into()
    }
}

/// How a disk is to be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// The image.
    #[schema(schema_with = image_reference)]
    pub image: Image,
    /// Refuse everything that changes data.
    #[serde(default)]
    pub read_only: bool,
    /// Serve it to NBD clients, at RUN_DIR/nbd/NAME.sock and by name at RUN_DIR/nbd.sock. A disk needs a frontend.
    #[serde(default)]
    pub nbd: bool,
    /// Serve it by blkif to local clients that share their memory, at RUN_DIR/blkif/NAME.sock.
    #[serde(default)]
    pub blkif: bool,
    /// Give it to a guest of Xen; it ends with the boot of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// Limits of the disk itself.
    #[serde(default)]
    pub limits: LimitChange,
    /// Groups whose limits hold as well, nearest first.
    #[serde(default)]
    #[schema(max_items = 4, schema_with = names_schema)]
    pub groups: Vec<String>,
    /// When a read, write or flush fails; the configuration decides when absent.
    #[serde(default)]
    pub on_error: Option<ErrorPolicy>,
    /// When the store is full; the configuration decides when absent.
    #[serde(default)]
    pub on_enospc: Option<ErrorPolicy>,
    /// The shard to serve it; the least loaded when absent.
    #[serde(default, deserialize_with = "optional_shard")]
    #[schema(maximum = 65535)]
    pub shard: Option<u16>,
}

/// A guest of Xen, and where it finds the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// The domain's number or name; 0 is the host's own.
    #[schema(max_length = 255)]
    pub domain: String,
    /// The name of the disk in the guest: xvda, sda, hda, or with a partition xvda1.
    #[schema(max_length = 32)]
    pub vdev: String,
}

fn image_reference() -> RefOr<Schema> {
    RefOr::Ref(Ref::from_schema_name("Image"))
}

fn names_schema() -> Schema {
    ArrayBuilder::new()
        .items(ObjectBuilder::new().schema_type(Type::String).pattern(Some(NAME_PATTERN)))
        .unique_items(true)
        .max_items(Some(4))
        .into()
}

/// The states of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Serves.
    Running,
    /// Takes no new requests; those in flight finish.
    Pausing,
    /// Requests wait.
    Paused,
    /// The store failed, and requests wait for `resume` or `fail`.
    StorageError,
    /// The disk's own code failed; it waits for its operations and is then opened again.
    Quarantined,
    /// Being detached.
    Draining,
    /// Detached by force; operations of the kernel are still out.
    Zombie,
    /// On its way to another shard.
    Moving,
    /// Not served: the image could not be opened, the shard ended, or it was given up.
    Failed,
    /// A guest's, connected by a daemon that is dead: its image is open and locked, its guest waits.
    AwaitingRecovery,
}

impl State {
    /// The name that tables and metrics use.
    pub fn name(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Pausing => "pausing",
            State::Paused => "paused",
            State::StorageError => "storage-error",
            State::Quarantined => "quarantined",
            State::Draining => "draining",
            State::Zombie => "zombie",
            State::Moving => "moving",
            State::Failed => "failed",
            State::AwaitingRecovery => "awaiting-recovery",
        }
    }

    /// From the number in a disk's counters.
    pub fn from_counter(number: u64) -> State {
        const BY_NUMBER: [(DiskState, State); 9] = [
            (DiskState::Running, State::Running),
            (DiskState::Pausing, State::Pausing),
            (DiskState::Paused, State::Paused),
            (DiskState::StorageError, State::StorageError),
            (DiskState::Quarantined, State::Quarantined),
            (DiskState::Draining, State::Draining),
            (DiskState::Zombie, State::Zombie),
            (DiskState::Parked, State::Moving),
            (DiskState::Failed, State::Failed),
        ];
        BY_NUMBER.iter().find(|(shard, _)| *shard as u64 == number).map_or(State::Failed, |(_, state)| *state)
    }
}

/// Where clients find a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Frontend {
    /// `nbd`, `blkif` or `xen`.
    pub kind: String,
    /// What to give to a client: `nbd+unix:///d1?socket=/run/blktapd/nbd/d1.sock`, `blkif+unix:///d1?socket=/run/blktapd/blkif/d1.sock`;
    /// of a guest's device, its place in XenStore: `xen:vbd3/5/51712`.
    pub uri: String,
    /// The path of the socket, if it has one.
    pub socket: Option<String>,
}

/// One client of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Connection {
    /// Who: `unix pid 1234 (fio)` or `tcp 127.0.0.1:4711`.
    pub peer: String,
    /// Requests in flight.
    pub in_flight: u32,
    /// Seconds since it connected.
    pub age_s: u64,
}

/// A disk as `list` and `show` print it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// Why it is in that state, when there is more to say.
    pub reason: Option<String>,
    /// Its image in canonical notation.
    pub image: String,
    /// Changes are refused.
    pub read_only: bool,
    /// Size that clients see; absent while it is not open.
    pub size_bytes: Option<u64>,
    /// Bytes that the image occupies, where the store tells; some seconds old.
    pub allocated_bytes: Option<u64>,
    /// The shard that serves it.
    pub shard: Option<usize>,
    /// Where clients find it.
    pub frontends: Vec<Frontend>,
    /// Connected clients.
    pub clients: u64,
    /// Who they are; only in the answer for one disk.
    pub connections: Option<Vec<Connection>>,
    /// Requests taken and not answered.
    pub io_now: u64,
    /// Limits that are set.
    pub limits: LimitChange,
    /// Groups, nearest first.
    pub groups: Vec<String>,
    /// When a read, write or flush fails.
    pub on_error: ErrorPolicy,
    /// When the store is full.
    pub on_enospc: ErrorPolicy,
    /// Times that acknowledged data was declared in doubt (`resume --data-in-doubt`), over all restarts.
    pub data_in_doubt: u64,
    /// Seconds until a failed disk is tried again.
    pub retry_in_s: Option<u64>,
    /// Seconds since it was attached or restored.
    pub age_s: u64,
}

/// Latency quantiles in microseconds, since the disk last became busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quantiles {
    /// Requests measured.
    pub count: u64,
    /// Half of them took at most this long.
    pub p50_us: u64,
    /// 99 % of them took at most this long.
    pub p99_us: u64,
    /// 99.9 % of them took at most this long.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Counters of one kind of operation since the disk was attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OpTotals {
    /// Answered without error.
    pub completed: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Answered with an error.
    pub errors: u64,
    /// Requests that waited for a limit.
    pub throttled: u64,
    /// Seconds that they waited.
    pub throttled_seconds: f64,
    /// Requests that a dry-run limit would have delayed.
    pub would_throttle: u64,
}

/// Figures of one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskStats {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// The shard that serves it.
    pub shard: Option<usize>,
    /// Connected clients.
    pub clients: u64,
    /// Requests taken and not answered.
    pub io_now: u64,
    /// Those of them that wait for a limit.
    pub throttled_now: u64,
    /// Totals by operation: read, write, flush, discard, write_zeroes.
    pub ops: BTreeMap<String, OpTotals>,
    /// Latency from arrival to answer by operation (read, write, flush), and of waiting alone (queue); absent when the disk
    /// has been idle.
    pub latency: BTreeMap<String, Quantiles>,
    /// The daemon's clock when the counters were read, in microseconds: rates are differences over differences.
    pub at_us: u64,
}

/// What a shard is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ShardState {
    /// Its loop turns.
    Running,
    /// Its loop has not turned for seconds.
    Stalled,
    /// Its thread has ended; its disks went to other shards.
    Ended,
}

/// One shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Shard {
    /// Its number.
    pub index: usize,
    /// The CPU that it is pinned to; absent when it is not pinned.
    pub cpu: Option<usize>,
    /// What it is doing.
    pub state: ShardState,
    /// Why it ended.
    pub reason: Option<String>,
    /// Ring set-up in use: deferred, cooperative or plain.
    pub ring: String,
    /// It gets memory without waiting for write-back that may wait for it (`PR_SET_IO_FLUSHER`; needs CAP_SYS_RESOURCE).
    pub io_flusher: bool,
    /// Disks served.
    pub disks: u64,
    /// Connections served.
    pub clients: u64,
    /// Kernel operations in flight.
    pub ops_in_flight: u64,
    /// Bytes of I/O buffers in use.
    pub buffer_bytes: u64,
    /// Requests that waited for a buffer.
    pub buffer_waits: u64,
    /// Seconds of work since the start.
    pub busy_seconds: f64,
    /// Share of the last seconds spent working, 0 to 1.
    pub busy_ratio: f64,
    /// Turns of the loop.
    pub turns: u64,
    /// Turns of more than 10 ms: the other disks of the shard waited.
    pub slow_turns: u64,
    /// Milliseconds since the last turn.
    pub heartbeat_age_ms: u64,
}

/// A group of disks with limits over all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Limits that are set.
    pub limits: LimitChange,
    /// Disks in it.
    pub disks: Vec<String>,
    /// The configuration names it: limits set otherwise last until the next reload or restart.
    pub configured: bool,
}

/// A guest's device as XenStore and its shard know it, or a client without Xen that shares memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestDevice {
    /// Its place below `backend/`: `vbd3/5/51712`; `blkif/DISK/NUMBER` without Xen.
    pub device: String,
    /// The guest's domain; without Xen the number of the client, from 32768 on.
    pub domain: u16,
    /// The name of the disk in the guest; `-` without Xen.
    pub vdev: String,
    /// The disk that it has.
    pub disk: Option<String>,
    /// Our XenBus state: 1 initialising, 2 waiting for the frontend, 4 connected, 5 closing, 6 closed.
    pub backend_state: Option<u8>,
    /// The frontend's.
    pub frontend_state: Option<u8>,
    /// We serve it: it belongs to nobody else.
    pub served: bool,
    /// How far the shard is with it: idle, awaiting, connecting, abandoning, connected, draining.
    pub link: String,
    /// Why it is not served, or what went wrong last.
    pub reason: Option<String>,
    /// Queues in use, while connected.
    pub queues: Option<u32>,
    /// Entries of each ring, while connected.
    pub ring_entries: Option<u32>,
    /// Its pages are kept mapped, while connected.
    pub persistent: Option<bool>,
    /// What it did.
    pub counters: Option<BTreeMap<String, u64>>,
}

/// For the script of a toolstack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClaimRequest {
    /// The script's XENBUS_PATH: `backend/vbd/5/51712`.
    #[schema(max_length = 255)]
    pub xenbus_path: String,
}

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Somebody did something.
    Info,
    /// Somebody should look.
    Warning,
    /// Somebody must act.
    Error,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number; they grow by one.
    pub seq: u64,
    /// Milliseconds since 1970 (UTC).
    pub unix_ms: u64,
    /// How much it matters.
    pub level: Level,
    /// The disk that it is about.
    pub disk: Option<String>,
    /// What happened.
    pub message: String,
}

/// The program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// `blktapd`.
    pub program: String,
    /// Its version.
    pub version: String,
    /// The version of the API.
    pub api: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
}

/// What a reload did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reload {
    /// Settings that changed and are in effect.
    pub applied: Vec<String>,
    /// Settings that changed and need a restart.
    pub restart: Vec<String>,
}

/// Whether the daemon can serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// All shards turn.
    pub healthy: bool,
    /// What is wrong.
    pub problems: Vec<String>,
}

/// How long a command may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Deadline {
    /// Seconds; 30 when absent.
    #[param(minimum = 0, maximum = 600)]
    pub timeout_s: Option<u32>,
}

/// How to detach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DetachQuery {
    /// Do not wait for clients or the kernel.
    #[serde(default)]
    pub force: Option<bool>,
    /// Seconds; 30 when absent.
    #[param(minimum = 0, maximum = 600)]
    pub timeout_s: Option<u32>,
}

/// How to pause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct PauseQuery {
    /// Also close the image and give its locks back, so that a script can work on it. A resume opens it again.
    #[serde(default)]
    pub release: Option<bool>,
    /// Seconds; 30 when absent.
    #[param(minimum = 0, maximum = 600)]
    pub timeout_s: Option<u32>,
}

/// Which events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventQuery {
    /// Only events with a greater number.
    #[param(minimum = 0)]
    pub after: Option<u64>,
    /// The newest so many at most.
    #[param(minimum = 1, maximum = 1024)]
    pub limit: Option<u32>,
}

/// New limits of a disk, and its groups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct QosRequest {
    /// Limits to change; 0 removes one.
    pub limits: LimitChange,
    /// New groups, nearest first; the present ones stay when absent.
    #[schema(schema_with = optional_names_schema)]
    pub groups: Option<Vec<String>>,
}

fn optional_names_schema() -> Schema {
    ArrayBuilder::new()
        .schema_type(utoipa::openapi::schema::SchemaType::from_iter([Type::Array, Type::Null]))
        .items(ObjectBuilder::new().schema_type(Type::String).pattern(Some(NAME_PATTERN)))
        .unique_items(true)
        .max_items(Some(4))
        .into()
}

/// How to resume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ResumeRequest {
    /// After a failed fdatasync: go on although acknowledged data may be lost.
    pub data_in_doubt: bool,
    /// Another image for a paused disk, of the same size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
}

/// An overlay to put over a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotItem {
    /// The disk.
    pub disk: String,
    /// The new image (qcow2 or vhd), whose file does not exist yet.
    pub image: Image,
}

/// Disks that get overlays at one instant, all or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// At least one.
    pub disks: Vec<SnapshotItem>,
}

/// A new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// Bytes, a multiple of 512, not less than now.
    #[serde(deserialize_with = "bytes")]
    #[schema(maximum = 9223372036854775296_i64)]
    pub size_bytes: u64,
}

/// Where to move a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// Number of the shard.
    #[serde(deserialize_with = "shard")]
    #[schema(maximum = 65535)]
    pub shard: u16,
}

/// A size in bytes; JSON knows no difference between 512 and 512.0.
fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let number = serde_json::Number::deserialize(from)?;
    let whole =
        |number: f64| (number.fract() == 0.0 && (0.0..9.3e18).contains(&number)).then_some(number as u64);
    number.as_u64().or_else(|| number.as_f64().and_then(whole)).ok_or_else(|| {
        let found = serde::de::Unexpected::Other("another number");
        serde::de::Error::invalid_value(found, &"a size in bytes")
    })
}

/// A shard's number; JSON knows no difference between 1 and 1.0.
fn shard<'de, D: Deserializer<'de>>(from: D) -> Result<u16, D::Error> {
    let number = f64::deserialize(from)?;
    if number.fract() == 0.0 && (0.0..=f64::from(u16::MAX)).contains(&number) {
        Ok(number as u16)
    } else {
        let found = serde::de::Unexpected::Float(number);
        Err(serde::de::Error::invalid_value(found, &"the number of a shard, from 0 to 65535"))
    }
}

fn optional_shard<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u16>, D::Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Number(#[serde(deserialize_with = "shard")] u16);
    Ok(Option::<Number>::deserialize(from)?.map(|Number(number)| number))
}
