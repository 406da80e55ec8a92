//! Registration and advice as values that can be stepped, for one thread that drives everything from one seed.

use super::region::ModelRegion;
use super::{ModelDevice, ModelPd};
use crate::device::{AdviseError, RegisterError, RegisterOptions};
use crate::region::counters::add;
use crate::region::{Bringing, How, Mapped, Mode, Teardown};
use hw_model::hca::PdError;
use hw_model::sync::Arc;
use odp::fault::Progress;
use odp::space::UserRange;

/// A registration on its way to its key. Dropping it takes down what there is, and waits for it.
#[must_use = "a registration that is not polled to its end gives no region"]
pub struct Registration {
    pd: Arc<ModelPd>,
    memory: UserRange,
    options: RegisterOptions,
    stage: Stage,
}

enum Stage {
    Populating(Box<(Mapped, Bringing)>),
    /// It failed; what it had is being taken down.
    Undoing(Box<Teardown>, RegisterError),
    Over,
}

impl ModelDevice {
    /// A new protection domain, as the model's own type: regions in it can be registered step by step.
    ///
    /// # Errors
    /// [`PdError`] if the device has no more.
    pub fn alloc_model_pd(self: &Arc<Self>) -> Result<Arc<ModelPd>, PdError> {
        ModelPd::new(Arc::clone(self))
    }
}

impl ModelPd {
    /// Starts to register `memory`: it is watched when this returns, and has a key once what it gives has been polled to
    /// its end.
    ///
    /// # Errors
    /// See [`RegisterError`]. Nothing is left behind then.
    pub fn begin_register(
        self: &Arc<Self>,
        memory: &UserRange,
        options: RegisterOptions,
    ) -> Result<Registration, RegisterError> {
        if options.mode == Mode::Implicit {
            return Err(RegisterError::ImplicitInSteps);
        }
        let mapped = Mapped::unpopulated(self.device().dma(), memory, How::of(&options)?)?;
        let bringing = mapped.populating();
        let stage = Stage::Populating(Box::new((mapped, bringing)));
        Ok(Registration { pd: Arc::clone(self), memory: memory.clone(), options, stage })
    }
}

impl Registration {
    /// One step; never waits. Not to be called again once it is done.
    ///
    /// # Panics
    /// If it was done before.
    pub fn poll(&mut self) -> Progress<Result<Arc<ModelRegion>, RegisterError>> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Populating(mut populating) => match populating.1.poll() {
                Ok(Progress::Done(())) => self.give_key(populating.0),
                Ok(progress) => {
                    self.stage = Stage::Populating(populating);
                    if matches!(progress, Progress::Blocked) { Progress::Blocked } else { Progress::Again }
                }
                Err(failure) => {
                    let error = RegisterError::Map(failure.into());
                    self.undo(populating.0, error)
                }
            },
            Stage::Undoing(mut teardown, error) => {
                if teardown.poll() {
                    return Progress::Done(Err(error));
                }
                self.stage = Stage::Undoing(teardown, error);
                Progress::Blocked
            }
            Stage::Over => panic!("a registration is polled until it is done, and no further"),
        }
    }

    fn give_key(&mut self, mapped: Mapped) -> Progress<Result<Arc<ModelRegion>, RegisterError>> {
        match ModelRegion::with_key(&self.pd, &self.memory, self.options, mapped) {
            Ok(region) => Progress::Done(Ok(region)),
            Err((error, mapped)) => self.undo(*mapped, error.into()),
        }
    }

    fn undo(
        &mut self,
        mapped: Mapped,
        error: RegisterError,
    ) -> Progress<Result<Arc<ModelRegion>, RegisterError>> {
        self.stage = Stage::Undoing(Box::new(Teardown::begin(mapped)), error);
        Progress::Again
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Stage::Populating(populating) = std::mem::replace(&mut self.stage, Stage::Over) {
            Teardown::begin(populating.0).wait();
        }
    }
}

/// Advice that is being followed.
#[must_use = "advice that is not polled brings nothing in"]
pub struct Advice(Bringing);

impl Advice {
    pub(super) fn new(bringing: Bringing) -> Self {
        Self(bringing)
    }

    /// One step; never waits.
    ///
    /// # Errors
    /// See [`AdviseError`]: it has ended then.
    pub fn poll(&mut self) -> Result<Progress<()>, AdviseError> {
        let progress = self.0.poll();
        let published = self.0.take_published();
        add(&self.0.counters().page_prefetch, published);
        Ok(progress?)
    }
}
