//! Devices without a toolstack: both ends written by us, for `ctl attach --domain DOM --vdev V`, and removed by us.
//!
//! Both directories appear in one transaction with their permissions, so no guest ever sees half a device, or may read what is not
//! its own. The backend directory carries a mark ([`MARK`]) with the disk's name: only a directory with it is ever removed by us.
//! With the guest's consent a removal is what libxl does: `online` becomes 0 and the state Closing, the frontend closes, we answer
//! Closed, and then both directories go. By force they go at once, and the device's task lets go of the rings.

use super::batch::{Batch, Condition, Outcome};
use super::client::{Store, StoreError};
use super::device::{DOMID_FIRST_RESERVED, DeviceId, Domid, Kind, vdev_of};
use super::spec::MARK;
use super::wire::shown;
use super::xenbus::XenbusState;
use crate::problem::{Problem, ProblemKind};

/// A device to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDevice {
    /// Its guest.
    pub domid: Domid,
    /// Its number, see [`super::device::devid_of`].
    pub devid: u32,
    /// The name of its disk.
    pub disk: String,
    /// Writes are refused.
    pub read_only: bool,
}

/// The domain that an operator means: a number, or a name as toolstacks write it into XenStore.
pub async fn resolve(store: &Store, domain: &str) -> Result<Domid, Problem> {
    let none = |what: String| Problem::new(ProblemKind::NotFound, what);
    if !domain.is_empty() && domain.bytes().all(|byte| byte.is_ascii_digit()) {
        let domid = domain.parse::<Domid>().ok().filter(|domid| *domid < DOMID_FIRST_RESERVED);
        let Some(domid) = domid else {
            let message = format!(
                "{} is no domain's number: they are below {DOMID_FIRST_RESERVED}",
                shown(domain.as_bytes())
            );
            return Err(Problem::invalid(message));
        };
        return match store.domain_exists(domid).await? {
            true => Ok(domid),
            false => Err(none(format!("there is no domain {domid}: `xl list` shows the domains"))),
        };
    }
    let domids = store.list("/local/domain").await?.unwrap_or_default();
    let paths: Vec<String> = domids.iter().map(|domid| format!("/local/domain/{domid}/name")).collect();
    let names = store.read_all(&paths).await?;
    let found: Vec<Domid> = domids
        .iter()
        .zip(names)
        .filter(|(_, name)| name.as_deref() == Some(domain.as_bytes()))
        .filter_map(|(domid, _)| domid.parse().ok())
        .collect();
    match found[..] {
        [domid] => Ok(domid),
        [] => Err(none(format!(
            "no domain is called {:?}: `xl list` shows the domains",
            shown(domain.as_bytes())
        ))),
        _ => Err(Problem::new(
            ProblemKind::Conflict,
            format!("several domains are called {:?} ({found:?}): give the number", shown(domain.as_bytes())),
        )),
    }
}

/// Makes a device in state Initialising. Making the same device for the same disk again is no error.
pub async fn attach(store: &Store, device: &NewDevice) -> Result<DeviceId, Problem> {
    let own = store.own_domid().await?;
    let id = DeviceId { kind: Kind::Vbd3, domid: device.domid, devid: device.devid };
    let (backend, frontend) = (id.backend(own), id.frontend());
    if !store.domain_exists(device.domid).await? {
        let message = format!("there is no domain {}: `xl list` shows the domains", device.domid);
        return Err(Problem::new(ProblemKind::NotFound, message));
    }
    if is_same(store, &backend, device).await? {
        return Ok(id);
    }
    let mut batch = Batch::new()
        .only_if(Condition::Missing(backend.clone()))
        // A device of another backend, or one whose toolstack has not cleaned up.
        .only_if(Condition::Missing(frontend.clone()));
    let reader = [format!("n{own}"), format!("r{}", device.domid)];
    let guest = [format!("n{}", device.domid), format!("r{own}")];
    // The guest looks for devices in this directory; a toolstack makes it with the first one.
    let devices = format!("/local/domain/{}/device/vbd", device.domid);
    if store.list(&devices).await?.is_none() {
        batch = batch.mkdir(devices.clone()).permit(devices, &reader);
    }
    batch = nodes(batch, &backend, &reader, &backend_nodes(device, &frontend));
    batch = nodes(batch, &frontend, &guest, &frontend_nodes(device, own, &backend));
    match store.apply(&batch).await? {
        Outcome::Committed => Ok(id),
        Outcome::Refused(condition) => {
            let path = if condition == Condition::Missing(backend.clone()) { &backend } else { &frontend };
            Err(Problem::new(
                ProblemKind::Conflict,
                format!(
                    "domain {} has a device {} already ({path}): choose another --vdev, or detach that one",
                    device.domid,
                    vdev_of(device.devid)
                ),
            ))
        }
    }
}

/// One end: the directory first, so that all below it has its permissions from the moment it is there; then said once more of each.
fn nodes(batch: Batch, dir: &str, perms: &[String], pairs: &[(&str, String)]) -> Batch {
    let batch = batch.mkdir(dir).permit(dir, perms);
    pairs.iter().fold(batch, |batch, (name, value)| {
        let path = format!("{dir}/{name}");
        batch.write(path.clone(), value).permit(path, perms)
    })
}

fn backend_nodes(device: &NewDevice, frontend: &str) -> Vec<(&'static str, String)> {
    vec![
        ("frontend", frontend.to_owned()),
        ("frontend-id", device.domid.to_string()),
        ("online", "1".into()),
        ("removable", "0".into()),
        ("bootable", "1".into()),
        ("dev", vdev_of(device.devid)),
        ("type", Kind::Vbd3.name().into()),
        ("mode", if device.read_only { "r" } else { "w" }.into()),
        ("device-type", "disk".into()),
        (MARK, device.disk.clone()),
        ("state", XenbusState::Initialising.number().to_string()),
    ]
}

fn frontend_nodes(device: &NewDevice, own: Domid, backend: &str) -> Vec<(&'static str, String)> {
    vec![
        ("backend", backend.to_owned()),
        ("backend-id", own.to_string()),
        ("virtual-device", device.devid.to_string()),
        ("device-type", "disk".into()),
        ("trusted", "1".into()),
        ("state", XenbusState::Initialising.number().to_string()),
    ]
}

/// The device is there already, made by us for this disk, and not on its way out.
async fn is_same(store: &Store, backend: &str, device: &NewDevice) -> Result<bool, StoreError> {
    let paths = [MARK, "mode", "online"].map(|name| format!("{backend}/{name}"));
    let found = store.read_all(&paths).await?;
    let mode = if device.read_only { "r" } else { "w" };
    let wanted = [device.disk.as_str(), mode, "1"];
    Ok(found.iter().zip(wanted).all(|(value, wanted)| value.as_deref() == Some(wanted.as_bytes())))
}

/// Asks the guest to let go of a device that we made. Both directories go when it has; see [`super::backend::Backend::wait_gone`].
pub async fn detach(store: &Store, id: DeviceId) -> Result<(), Problem> {
    let own = store.own_domid().await?;
    let backend = id.backend(own);
    loop {
        let Some(state) = store.read(&format!("{backend}/state")).await? else { return Ok(()) };
        let batch = Batch::new()
            .only_if(Condition::Equals(
                format!("{backend}/state"),
                String::from_utf8_lossy(&state).into_owned(),
            ))
            .only_if(Condition::Exists(format!("{backend}/{MARK}")))
            .write(format!("{backend}/online"), 0);
        let batch = match XenbusState::parse(&state) {
            XenbusState::Closed => batch,
            _ => batch.write(format!("{backend}/state"), XenbusState::Closing.number()),
        };
        match store.apply(&batch).await? {
            Outcome::Committed => return Ok(()),
            Outcome::Refused(Condition::Exists(_)) => return Err(not_ours(id)),
            // The state changed meanwhile: it does so a few times in a device's life.
            Outcome::Refused(_) => {}
        }
    }
}

/// Takes a device away that we made, whatever the guest is doing with it.
pub async fn force(store: &Store, id: DeviceId) -> Result<(), Problem> {
    let own = store.own_domid().await?;
    let mark = format!("{}/{MARK}", id.backend(own));
    if store.list(&id.backend(own)).await?.is_none() {
        return Ok(());
    }
    match store.apply(&removal(own, id).only_if(Condition::Exists(mark))).await? {
        Outcome::Committed => Ok(prune(store, &ends(own, id)).await?),
        Outcome::Refused(_) => Err(not_ours(id)),
    }
}

/// Removes a device that we made, once it is closed and not online.
pub(super) async fn remove_closed(store: &Store, own: Domid, id: DeviceId) -> Result<(), StoreError> {
    let backend = id.backend(own);
    let batch = removal(own, id)
        .only_if(Condition::Equals(format!("{backend}/state"), XenbusState::Closed.number().to_string()))
        .only_if(Condition::Exists(format!("{backend}/{MARK}")));
    match store.apply(&batch).await? {
        Outcome::Committed => prune(store, &ends(own, id)).await,
        Outcome::Refused(_) => Ok(()),
    }
}

fn removal(own: Domid, id: DeviceId) -> Batch {
    ends(own, id).into_iter().fold(Batch::new(), Batch::remove)
}

/// Removes the directories above these nodes that have become empty.
pub(super) async fn prune(store: &Store, paths: &[String]) -> Result<(), StoreError> {
    for parent in paths.iter().filter_map(|path| path.rsplit_once('/')).map(|(parent, _)| parent) {
        store.apply(&Batch::new().only_if(Condition::Empty(parent.into())).remove(parent)).await?;
    }
    Ok(())
}

fn ends(own: Domid, id: DeviceId) -> [String; 3] {
    [id.frontend(), id.backend(own), id.error(own)]
}

fn not_ours(id: DeviceId) -> Problem {
    Problem::new(
        ProblemKind::Conflict,
        format!("device {id} was made by a toolstack: remove it there (`xl block-detach`)"),
    )
}
