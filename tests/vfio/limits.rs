//! Limits of the kernel, which are said by name.

use crate::bed::{Bed, PAGE, mapping};
use hw_model::iommu::{HostRefusal, LeafSize, MapError};
use libtest_mimic::Failed;
use mr::dma::LinkError;
use mr::dma::vfio::{OpenError, VfioContainer, VfioGroup};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

/// The parameter of the kernel that says how many mappings a container can have.
const ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// If the limit had no name, a driver would see "no space" for memory, of which there is enough.
pub fn entries(bed: &Bed) -> Result<(), Failed> {
    let most: u32 = std::fs::read_to_string(ENTRY_LIMIT)?.trim().parse()?;
    let container = bed.container()?;
    assert_eq!(container.limits().most_entries, Some(most));
    let (_memory, phys) = bed.memory(1);
    let pages = u64::from(most) + 1;
    let mapping = mapping(&container, pages * PAGE);
    for page in 0..u64::from(most) {
        mapping.link(page * PAGE, phys, PAGE, LeafSize::Page)?;
    }
    let last = u64::from(most) * PAGE;
    let refused = mapping.link(last, phys, PAGE, LeafSize::Page);
    let why = HostRefusal::TooManyMappings { most };
    let expected = MapError::Host { iova: mapping.iova().offset(last), why };
    assert_eq!(refused, Err(LinkError::Map(expected)));
    assert_eq!(container.limits().entries, u64::from(most));
    mapping.unlink(0, last)?;
    mapping.link(last, phys, PAGE, LeafSize::Page)?;
    mapping.unlink(last, PAGE)?;
    Ok(())
}

/// If the limit had no name, a driver would see "no memory" on a machine with plenty.
pub fn locked(bed: &Bed) -> Result<(), Failed> {
    let container = bed.container()?;
    let before = getrlimit(Resource::Memlock);
    let limit = 16 * PAGE;
    setrlimit(Resource::Memlock, Rlimit { current: Some(limit), maximum: before.maximum })?;
    let told = container.limits().memlock;
    if told.is_none() {
        setrlimit(Resource::Memlock, before)?;
        println!(
            "SKIPPED vfio locked memory: CAP_IPC_LOCK lifts the limit; run this as another user than root"
        );
        return Ok(());
    }
    let (_memory, phys) = bed.memory(32);
    let mapping = mapping(&container, 32 * PAGE);
    let refused = mapping.link(0, phys, 32 * PAGE, LeafSize::Page);
    setrlimit(Resource::Memlock, before)?;
    assert_eq!(told, Some(limit));
    let Err(LinkError::Map(MapError::Host { why, .. })) = refused else {
        return Err(format!("{refused:?}").into());
    };
    assert_eq!(why, HostRefusal::LockedMemory { needed: PAGE, locked: limit, limit });
    assert_eq!((mapping.linked(), container.limits().pinned), (0, 0));
    Ok(())
}

/// If these were bare numbers, nobody would know what to do.
pub fn opening(bed: &Bed) -> Result<(), Failed> {
    let first = bed.container()?;
    assert_eq!(bed.container().map(drop), Err(OpenError::Busy { group: bed.group }));
    drop(first);
    bed.container()?;
    let missing = VfioGroup(4_000_000);
    let said = VfioContainer::open(missing, &bed.space).map(drop);
    assert_eq!(said, Err(OpenError::NoGroup { group: missing }));
    let path = bed.group.path();
    let before = std::fs::metadata(&path)?.permissions();
    std::fs::set_permissions(&path, Permissions::from_mode(0o000))?;
    let said = bed.container().map(drop);
    std::fs::set_permissions(&path, before)?;
    if rustix::process::geteuid().is_root() {
        println!("SKIPPED vfio permission: root may open every file");
    } else {
        assert_eq!(said, Err(OpenError::Permission { path }));
    }
    let device = bed.container()?.device("0000:ff:1f.7".parse()?).map(drop);
    assert!(device.is_err_and(|error| error.to_string().contains("no device of group")));
    Ok(())
}
