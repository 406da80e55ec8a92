//! The RDMA devices that the backend `verbs` can open, and what each of them cannot do.

use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;

/// What the backend of real devices has to say.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Verbs {
    /// Whether this build has it (the cargo feature `verbs`).
    pub built: bool,
    /// The devices that libibverbs knows.
    pub devices: Vec<VerbsReport>,
}

/// A device that libibverbs knows.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct VerbsReport {
    /// Its name.
    pub name: String,
    /// Why it could not be opened; there is nothing else to say of it then.
    pub refused: Option<String>,
    /// What it can do.
    pub has: Vec<String>,
    /// What it cannot do: asking for it is an error that names both.
    pub lacks: Vec<String>,
    /// For each transport service, the operations whose memory may be on demand.
    pub on_demand: BTreeMap<&'static str, Vec<String>>,
    /// How many regions there may be, and so on.
    pub limits: BTreeMap<&'static str, u64>,
}

impl Verbs {
    #[cfg(feature = "verbs")]
    pub(super) fn look() -> Self {
        let devices = mr::device::verbs::devices();
        Self { built: true, devices: devices.into_iter().map(VerbsReport::of).collect() }
    }

    #[cfg(not(feature = "verbs"))]
    pub(super) fn look() -> Self {
        Self::default()
    }
}

impl VerbsReport {
    #[cfg(feature = "verbs")]
    fn of(name: String) -> Self {
        use mr::device::verbs::{Capability, Operations, VerbsDevice};
        let device = match VerbsDevice::open(&name) {
            Ok(device) => device,
            Err(error) => {
                let refused = Some(error.to_string());
                let (has, lacks) = (Vec::new(), Vec::new());
                return Self {
                    name,
                    refused,
                    has,
                    lacks,
                    on_demand: BTreeMap::new(),
                    limits: BTreeMap::new(),
                };
            }
        };
        let known = device.capabilities();
        let (has, lacks): (Vec<_>, Vec<_>) =
            Capability::ALL.into_iter().partition(|capability| known.has(*capability));
        let words = |capabilities: Vec<Capability>| capabilities.iter().map(ToString::to_string).collect();
        let names = |operations: Operations| {
            operations.iter_names().map(|(name, _)| name.to_lowercase().replace('_', " ")).collect()
        };
        let on_demand = BTreeMap::from([
            ("rc", names(known.on_demand_rc)),
            ("uc", names(known.on_demand_uc)),
            ("ud", names(known.on_demand_ud)),
        ]);
        let limits = BTreeMap::from([
            ("regions", known.max_regions),
            ("bytes of a region", known.max_region),
            ("queue pairs", u64::from(known.max_qps)),
            ("requests of a queue", u64::from(known.max_requests)),
            ("entries of a completion queue", u64::from(known.max_cq_entries)),
        ]);
        Self { name, refused: None, has: words(has), lacks: words(lacks), on_demand, limits }
    }

    /// What is said of it, one a row.
    pub(super) fn rows(&self) -> Vec<[String; 2]> {
        if let Some(refused) = &self.refused {
            return vec![["not opened".to_owned(), refused.clone()]];
        }
        let list = |words: &[String]| if words.is_empty() { "nothing".to_owned() } else { words.join(", ") };
        let mut rows = vec![["can".to_owned(), list(&self.has)], ["cannot".to_owned(), list(&self.lacks)]];
        rows.extend(
            self.on_demand.iter().map(|(service, what)| [format!("on demand, {service}"), list(what)]),
        );
        rows.extend(self.limits.iter().map(|(limit, value)| [(*limit).to_owned(), value.to_string()]));
        rows
    }
}
