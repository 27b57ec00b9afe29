//! Outlier detection by itself: around services that each stand for one endpoint of a group.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};

use http::{Request, Response, StatusCode};
use mesh_core::{ClusterName, Error, ErrorKind, ResponseFlags, UpstreamTls};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::{Detector, Observation, OutlierDetection};
use crate::balance::priority;
use crate::endpoint::Endpoint;
use crate::grpc;
use crate::lock_order::{MEMBERS, Ordered};
use crate::runtime::ClusterRuntime;

/// Nobody can take the request: 503 `UH`.
pub(crate) fn no_healthy_upstream() -> Error {
    Error::new(
        ErrorKind::NoHealthyUpstream,
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::NO_HEALTHY_UPSTREAM,
        "no_healthy_upstream",
    )
    .with_body("no healthy upstream")
}

/// Endpoints that are judged together: how many may be ejected at once is a share of them. Cloning shares it.
///
/// A [`Balance`](crate::Balance) has a group of its own; this is for programs that choose the endpoint themselves.
///
/// ```
/// use http::{Request, Response, StatusCode};
/// use mesh_core::{Body, Error};
/// use mesh_route::{OutlierDetection, OutlierGroup};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let config = OutlierDetection { consecutive_5xx: 3, max_ejection_percent: 50, ..OutlierDetection::default() };
/// let group = OutlierGroup::new("reviews", config);
/// let [bad, good] = [("10.0.0.1:80", 500), ("10.0.0.2:80", 200)].map(|(addr, status)| {
///     ServiceBuilder::new().layer(group.endpoint(addr.parse().unwrap())).service_fn(
///         move |_: Request<Body>| async move {
///             let mut response = Response::new(Body::empty());
///             *response.status_mut() = StatusCode::from_u16(status).unwrap();
///             Ok::<_, Error>(response)
///         },
///     )
/// });
/// for _ in 0..3 {
///     bad.clone().oneshot(Request::new(Body::empty())).await?;
/// }
/// // The service is not asked any more, for 30 seconds.
/// let error = bad.clone().oneshot(Request::new(Body::empty())).await.unwrap_err();
/// assert_eq!((error.status().as_u16(), error.details()), (503, "no_healthy_upstream"));
/// assert!(good.oneshot(Request::new(Body::empty())).await.is_ok());
/// assert_eq!(group.with_outliers(|outliers| outliers.ejected()), 1);
/// # Ok(())
/// # }
/// # let mut runtime = tokio::runtime::Builder::new_current_thread();
/// # runtime.enable_time().start_paused(true).build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct OutlierGroup(Arc<Group>);

#[derive(Debug)]
struct Group {
    config: OutlierDetection,
    runtime: ClusterRuntime,
    members: Ordered<MEMBERS, HashMap<SocketAddr, Weak<Member>>>,
    /// Services that were told that theirs is not ready: they have to hear that nobody waits for it any more.
    waiting: Mutex<HashMap<u64, Waker>>,
}

impl OutlierGroup {
    /// A group without endpoints; its name is that of its log lines.
    #[must_use]
    pub fn new(name: &str, config: OutlierDetection) -> Self {
        let runtime = ClusterRuntime::alone(ClusterName::custom(name));
        Self(Arc::new(Group { config, runtime, members: Ordered::default(), waiting: Mutex::default() }))
    }

    /// The layer for services that stand for this endpoint. The endpoint counts among those of the group as long as the
    /// layer lives or a service that it made; whoever asks for the same address meanwhile gets the same endpoint.
    #[must_use]
    pub fn endpoint(&self, addr: SocketAddr) -> OutlierDetectionLayer {
        let mut members = self.0.members.lock();
        if let Some(member) = members.get(&addr).and_then(Weak::upgrade) {
            drop(members);
            return OutlierDetectionLayer { member };
        }
        self.0.forget_gone(&mut members);
        let endpoint = self.0.runtime.endpoint(addr, &UpstreamTls::Disable);
        // It may be that of a member which is just going.
        endpoint.failures().clear();
        endpoint.set_ejected(false);
        let member = Arc::new(Member { group: Arc::clone(&self.0), endpoint });
        members.insert(addr, Arc::downgrade(&member));
        drop(members);
        // With one more there may be enough again without those that are ejected.
        self.0.tell();
        OutlierDetectionLayer { member }
    }

    /// Reads who is ejected and why; ejections that are over have ended.
    pub fn with_outliers<T>(&self, read: impl FnOnce(&Detector) -> T) -> T {
        self.0.let_return();
        self.0.runtime.with_outliers(read)
    }
}

impl Group {
    fn members(&self) -> usize {
        let members = self.members.lock();
        members.values().filter(|member| member.strong_count() > 0).count()
    }

    /// Those that are gone are none of the group, nor of the ejected.
    fn forget_gone(&self, members: &mut HashMap<SocketAddr, Weak<Member>>) {
        members.retain(|_, member| member.strong_count() > 0);
        self.runtime.retain_outliers(|addr| members.contains_key(addr));
    }

    /// Whether the endpoint takes requests: it is not ejected, or too many are (DR-OD04).
    fn takes(&self, endpoint: &Endpoint) -> bool {
        self.let_return();
        if !endpoint.is_ejected() {
            return true;
        }
        let all = self.members();
        let ejected = self.runtime.with_outliers(Detector::ejected);
        let loads = priority::loads(&[(all.saturating_sub(ejected), all)], self.config.min_health_percent);
        loads.iter().any(|load| load.panic)
    }

    fn let_return(&self) {
        if self.runtime.let_return(mesh_core::clock::now) {
            // With those that returned there may be enough again without the others.
            self.tell();
        }
    }

    fn observe(&self, endpoint: &Endpoint, seen: Observation) {
        if self.runtime.observe(&self.config, endpoint, seen, || self.members()) {
            self.tell();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has those look again who wait for a service: who takes requests has changed.
    fn tell(&self) {
        let waiting = std::mem::take(&mut *self.waiting());
        waiting.into_values().for_each(Waker::wake);
    }
}

/// An endpoint for as long as somebody stands for it.
#[derive(Debug)]
struct Member {
    group: Arc<Group>,
    endpoint: Arc<Endpoint>,
}

impl Member {
    fn takes(&self) -> bool {
        self.group.takes(&self.endpoint)
    }

    fn observe(&self, seen: Observation) {
        self.group.observe(&self.endpoint, seen);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.forget_gone(&mut self.group.members.lock());
        // With one fewer there may be too few without those that are ejected, or enough if it was one of them.
        self.group.tell();
    }
}

/// Leaves an endpoint out for a while that keeps failing (DR-OD01 to DR-OD08): while it is ejected, requests are answered
/// 503 `UH` without asking the service. [`OutlierGroup::endpoint`] makes it.
///
/// Answers count by their status, a gRPC status in the head by what it stands for; failures by the kind of the
/// [`mesh_core::Error`] of the service. What is not the endpoint's does not count: limits of ours, and a request that was
/// dropped. So a timeout that is to count stands below this layer, a [`TimeoutLayer`](crate::TimeoutLayer) for instance.
#[derive(Clone, Debug)]
pub struct OutlierDetectionLayer {
    member: Arc<Member>,
}

impl OutlierDetectionLayer {
    /// Whether the endpoint takes no requests now.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        !self.member.takes()
    }
}

impl<S> Layer<S> for OutlierDetectionLayer {
    type Service = DetectOutlier<S>;

    fn layer(&self, inner: S) -> DetectOutlier<S> {
        DetectOutlier { inner, is_ready: false, wait: None, layer: self.clone() }
    }
}

/// The service of [`OutlierDetectionLayer`]. While the endpoint is ejected it is ready, whether or not the service is.
#[derive(Debug)]
pub struct DetectOutlier<S> {
    inner: S,
    /// Whether `inner` has said that it is ready, and was not called since.
    is_ready: bool,
    /// There while `inner` is waited for.
    wait: Option<Wait>,
    layer: OutlierDetectionLayer,
}

/// A place among those who wait for a service of the group.
#[derive(Debug)]
struct Wait {
    id: u64,
    group: Arc<Group>,
}

impl Wait {
    fn new(group: &Arc<Group>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), group: Arc::clone(group) }
    }

    fn by(&self, waker: &Waker) {
        let waker = waker.clone();
        let before = self.group.waiting().insert(self.id, waker);
        // Outside the lock, both: whoever is the last to hold a task ends it, and with it perhaps another that waits.
        drop(before);
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let waker = self.group.waiting().remove(&self.id);
        // Outside the lock: whoever is the last to hold a task ends it.
        drop(waker);
    }
}

impl<S> DetectOutlier<S> {
    fn takes(&self) -> bool {
        self.layer.member.takes()
    }
}

impl<S: Clone> Clone for DetectOutlier<S> {
    fn clone(&self) -> Self {
        self.layer.layer(self.inner.clone())
    }
}

impl<S, B, R> Service<Request<B>> for DetectOutlier<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<Error>,
{
    type Response = Response<R>;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if !self.takes() {
            return Poll::Ready(Ok(()));
        }
        let Poll::Ready(ready) = self.inner.poll_ready(cx) else {
            let group = &self.layer.member.group;
            self.wait.get_or_insert_with(|| Wait::new(group)).by(cx.waker());
            // It may have been ejected before it was there to be told.
            return if self.takes() { Poll::Pending } else { Poll::Ready(Ok(())) };
        };
        self.wait = None;
        let ready = ready.map_err(Into::into);
        self.is_ready = ready.is_ok();
        if let Err(error) = &ready
            && let Some(seen) = Observation::of_failure(error.kind())
        {
            self.layer.member.observe(seen);
        }
        Poll::Ready(ready)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S::Future> {
        // One that has returned since it was found ejected was not asked whether it is ready, and is not called.
        let state = if self.is_ready && self.takes() {
            self.is_ready = false;
            State::Asked(self.inner.call(request), Some(self.layer.clone()))
        } else {
            State::Ejected(Some(no_healthy_upstream()))
        };
        ResponseFuture(state)
    }
}

/// The future of [`DetectOutlier`].
#[pin_project]
pub struct ResponseFuture<F>(#[pin] State<F>);

#[pin_project(project = StateProjection)]
enum State<F> {
    Asked(#[pin] F, Option<OutlierDetectionLayer>),
    Ejected(Option<Error>),
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<Error>,
{
    type Output = Result<Response<R>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            StateProjection::Asked(future, layer) => {
                let outcome = ready!(future.poll(cx)).map_err(Into::into);
                let seen = match &outcome {
                    Ok(response) => {
                        Some(Observation::of_response(response.status(), grpc::status(response.headers())))
                    }
                    Err(error) => Observation::of_failure(error.kind()),
                };
                if let (Some(OutlierDetectionLayer { member }), Some(seen)) = (layer.take(), seen) {
                    member.observe(seen);
                }
                Poll::Ready(outcome)
            }
            // Polled after it was ready, which the contract of futures forbids, it stays.
            StateProjection::Ejected(error) => {
                error.take().map_or(Poll::Pending, |error| Poll::Ready(Err(error)))
            }
        }
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.0 {
            State::Asked(..) => "asked",
            State::Ejected(_) => "ejected",
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use mesh_core::Body;
    use tower::{BoxError, ServiceBuilder, ServiceExt as _, service_fn};

    use super::super::{Cause, EventKind};
    use super::*;
    use crate::{CircuitBreakerLayer, TimeoutLayer};

    fn config() -> OutlierDetection {
        OutlierDetection { consecutive_5xx: 2, max_ejection_percent: 100, ..OutlierDetection::default() }
    }

    fn addr(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn answers(
        status: u16,
        calls: &Arc<AtomicU32>,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = Error, Future: Send> + Clone + use<>
    {
        let calls = Arc::clone(calls);
        service_fn(move |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(Response::builder().status(status).body(Body::empty()).unwrap()))
        })
    }

    async fn ask<S>(service: &S) -> u16
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Error> + Clone,
    {
        let asked = service.clone().oneshot(Request::new(Body::empty())).await;
        asked.map_or_else(|error| error.status().as_u16() * 10, |response| response.status().as_u16())
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od02_an_ejected_endpoint_is_not_asked_until_its_time_is_over_layer() {
        let group = OutlierGroup::new("a", config());
        let calls = Arc::default();
        let layer = group.endpoint(addr(1));
        let service = layer.layer(answers(500, &calls));
        assert_eq!([ask(&service).await, ask(&service).await], [500, 500]);
        assert!(layer.is_ejected());
        assert_eq!([ask(&service).await, ask(&service).await], [5030, 5030]);
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!([ask(&service).await, ask(&service).await, ask(&service).await], [500, 500, 5030]);
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert_eq!(ask(&service).await, 5030, "the second time is twice as long");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(ask(&service).await, 500);
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od03_the_share_is_that_of_the_group_layer() {
        let group = OutlierGroup::new("a", OutlierDetection { max_ejection_percent: 50, ..config() });
        let calls = Arc::default();
        let mut services: Vec<_> =
            (1..=4).map(|port| group.endpoint(addr(port)).layer(answers(500, &calls))).collect();
        for service in &services {
            ask(service).await;
            ask(service).await;
        }
        assert_eq!(group.with_outliers(|outliers| (outliers.ejected(), outliers.prevented())), (2, 2));
        // Those that are gone count no more, and one that comes back is as good as new.
        services.drain(..2);
        assert_eq!(group.0.members(), 2);
        let again = group.endpoint(addr(1));
        assert_eq!((group.0.members(), again.is_ejected()), (3, false));
        assert_eq!(group.with_outliers(Detector::ejected), 0);
        let again = again.layer(answers(500, &calls));
        assert_eq!([ask(&again).await, ask(&again).await, ask(&again).await], [500, 500, 5030]);
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od04_when_too_few_are_left_all_are_asked_layer() {
        let group = OutlierGroup::new("a", OutlierDetection { min_health_percent: 60, ..config() });
        let calls = Arc::default();
        let [bad, good] = [(1, 500), (2, 200)]
            .map(|(port, status)| group.endpoint(addr(port)).layer(answers(status, &calls)));
        assert_eq!([ask(&bad).await, ask(&bad).await, ask(&good).await], [500, 500, 200]);
        assert_eq!(group.with_outliers(Detector::ejected), 1);
        assert_eq!(ask(&bad).await, 500, "half is less than 60 %");
    }

    /// A task that waits for a service.
    struct Waits<S> {
        service: S,
        woken: Arc<Woken>,
    }

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl<S: Service<Request<Body>>> Waits<S> {
        fn new(service: S) -> Self {
            Self { service, woken: Arc::default() }
        }

        fn poll(&mut self) -> Poll<Result<(), S::Error>> {
            let waker = Arc::clone(&self.woken).into();
            self.service.poll_ready(&mut Context::from_waker(&waker))
        }

        fn is_woken(&self) -> bool {
            self.woken.0.load(Ordering::Relaxed) > 0
        }
    }

    /// Ready as often as it is told, and broken when it is called without.
    #[derive(Clone)]
    struct ReadyTimes(Arc<AtomicU32>);

    impl Service<Request<Body>> for ReadyTimes {
        type Response = Response<Body>;
        type Error = Error;
        type Future = std::future::Ready<Result<Response<Body>, Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
            match self.0.load(Ordering::Relaxed) {
                0 => Poll::Pending,
                _ => Poll::Ready(Ok(())),
            }
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            let left = self.0.load(Ordering::Relaxed).checked_sub(1).expect("a call without being ready");
            self.0.store(left, Ordering::Relaxed);
            std::future::ready(Ok(Response::builder().status(500).body(Body::empty()).unwrap()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od02_an_ejected_endpoint_that_is_not_ready_is_refused_at_once_layer() {
        let group = OutlierGroup::new("a", config());
        let times = Arc::new(AtomicU32::new(2));
        let mut service = group.endpoint(addr(1)).layer(ReadyTimes(Arc::clone(&times)));
        assert_eq!([ask(&service).await, ask(&service).await], [500, 500]);
        let refused = tokio::time::timeout(Duration::from_secs(1), ask(&service)).await;
        assert_eq!(refused, Ok(5030), "nobody waits for who takes no request");
        // It returns between the two calls: what was not ready then is not called.
        service.ready().await.unwrap();
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert!(!service.layer.is_ejected());
        assert_eq!(service.call(Request::new(Body::empty())).await.unwrap_err().status(), 503);
        // Nor is a clone of one that was.
        times.store(1, Ordering::Relaxed);
        service.ready().await.unwrap();
        assert!(service.clone().call(Request::new(Body::empty())).await.is_err());
        assert_eq!(service.call(Request::new(Body::empty())).await.unwrap().status(), 500);
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od02_bug_who_waited_for_an_endpoint_as_it_was_ejected_was_not_told_layer() {
        let group = OutlierGroup::new("a", config());
        let layer = group.endpoint(addr(1));
        let never = Arc::<AtomicU32>::default();
        let mut waits = Waits::new(layer.layer(ReadyTimes(never)));
        assert!(waits.poll().is_pending() && waits.poll().is_pending());
        let failing = layer.layer(answers(500, &Arc::default()));
        assert_eq!([ask(&failing).await, ask(&failing).await], [500, 500]);
        assert!(waits.is_woken(), "nothing else will wake it");
        assert!(waits.poll().is_ready());
        assert_eq!(ask(&waits.service).await, 5030);
        // One that is gone is not told, and not kept.
        let mut gone = Waits::new(group.endpoint(addr(2)).layer(ReadyTimes(Arc::default())));
        assert!(gone.poll().is_pending());
        assert_eq!(group.0.waiting().len(), 1);
        drop((waits, gone));
        assert_eq!(group.0.waiting().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od04_bug_who_waited_was_not_told_that_members_came_or_went_layer() {
        let group = OutlierGroup::new("a", OutlierDetection { min_health_percent: 60, ..config() });
        let bad = group.endpoint(addr(1));
        let _good = group.endpoint(addr(2));
        let failing = bad.layer(answers(500, &Arc::default()));
        assert_eq!([ask(&failing).await, ask(&failing).await], [500, 500]);
        let mut waits = Waits::new(bad.layer(ReadyTimes(Arc::default())));
        assert!(waits.poll().is_pending(), "too few are left, so all are asked");
        let more: Vec<_> = (3..5).map(|port| group.endpoint(addr(port))).collect();
        assert!(bad.is_ejected(), "enough are left");
        assert!(waits.is_woken(), "nothing else will wake it");
        assert!(waits.poll().is_ready());
        drop(more);
        assert!(!bad.is_ejected(), "too few again");
        let worse = group.endpoint(addr(6));
        let failing = worse.layer(answers(500, &Arc::default()));
        let more: Vec<_> = (7..9).map(|port| group.endpoint(addr(port))).collect();
        assert_eq!([ask(&failing).await, ask(&failing).await], [500, 500]);
        let mut waits = Waits::new(bad.layer(ReadyTimes(Arc::default())));
        assert_eq!(group.with_outliers(Detector::ejected), 2);
        // Three of five are 60 %: enough.
        assert!(waits.poll().is_ready());
        drop(more);
        assert!(waits.poll().is_pending(), "one of three");
        drop((worse, failing));
        assert_eq!(group.with_outliers(Detector::ejected), 1, "who is gone is none of the ejected");
        assert!(waits.is_woken());
    }

    /// A waker that ends another which waits when it is dropped, as a task that nobody holds any more does.
    struct Ends(Mutex<Option<Wait>>);

    impl std::task::Wake for Ends {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for Ends {
        fn drop(&mut self) {
            drop(self.0.lock().unwrap().take());
        }
    }

    #[test]
    fn bug_a_waker_that_ended_another_which_waits_waited_for_itself() {
        let group = OutlierGroup::new("a", config());
        let (done, is_done) = std::sync::mpsc::channel();
        let waiting = Arc::clone(&group.0);
        // Apart: with the bug it never comes back.
        std::thread::spawn(move || {
            let wait = Wait::new(&waiting);
            wait.by(&Arc::new(Ends(Some(Wait::new(&waiting)).into())).into());
            wait.by(Waker::noop());
            wait.by(&Arc::new(Ends(Some(Wait::new(&waiting)).into())).into());
            drop(wait);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(60)).expect("it comes back");
        assert_eq!(group.0.waiting().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn dr_cp04_what_is_ours_is_not_the_endpoints_layer() {
        let group = OutlierGroup::new("a", config());
        // Refused by a limit below.
        let full = ServiceBuilder::new()
            .layer(group.endpoint(addr(1)))
            .layer(CircuitBreakerLayer::new().max_requests(0))
            .service(answers(200, &Arc::default()));
        // Cancelled.
        let hangs = ServiceBuilder::new()
            .layer(group.endpoint(addr(2)))
            .service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Error>>());
        // A foreign error is a defect.
        let broken = ServiceBuilder::new()
            .layer(group.endpoint(addr(3)))
            .service_fn(|_: Request<Body>| async { Err::<Response<Body>, BoxError>("boom".into()) });
        for _ in 0..5 {
            assert_eq!(ask(&full).await, 5030);
            assert_eq!(ask(&broken).await, 5000);
            let cancelled = tokio::time::timeout(Duration::from_secs(1), ask(&hangs)).await;
            assert!(cancelled.is_err());
        }
        assert_eq!(group.with_outliers(|outliers| outliers.events().len()), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn dr_od08_an_ejection_has_its_evidence_and_a_timeout_below_counts_layer() {
        let config = OutlierDetection { split_local_origin: true, consecutive_local_origin: 3, ..config() };
        let group = OutlierGroup::new("a", config);
        let service = ServiceBuilder::new()
            .layer(group.endpoint(addr(7)))
            .layer(TimeoutLayer::new(Duration::from_secs(1)))
            .service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Error>>());
        assert_eq!([ask(&service).await, ask(&service).await, ask(&service).await], [5040; 3]);
        assert_eq!(ask(&service).await, 5030);
        let (endpoint, kind) = group
            .with_outliers(|outliers| outliers.events().map(|event| (event.endpoint, event.kind)).last())
            .unwrap();
        let EventKind::Ejected { evidence, times: 1, .. } = kind else { panic!("{kind}") };
        assert_eq!(
            (endpoint, evidence.cause, evidence.failures),
            (addr(7), Cause::ConsecutiveLocalOrigin, 3)
        );
        assert_eq!(evidence.last, Observation::Late);
    }
}
