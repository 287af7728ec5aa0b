package simulate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"

	"skein.io/skein/scheduler"
	"skein.io/skein/scheduler/controller"
)

// world is a cluster: an API, machines with agents, a succession of leaders, and eyes on all of it.
type world struct {
	seed      uint64
	s         *store
	agents    *agents
	storage   *storage
	inv       *invariants
	rnd       *rand.Rand // of the scenario; only its goroutine draws from it
	log       *slog.Logger
	jobLength time.Duration
	// afterWrite is called after each write of a leader, outside all locks.
	afterWrite func(r *http.Request) error

	fault  fault
	enough func() bool // what was noticed is what the test wants

	drawMu sync.Mutex
	draws  map[string]uint64 // guarded by drawMu
	loads  map[key]int64     // of autoscaled Deployments, in thousandths of a CPU; guarded by drawMu

	over    atomic.Bool   // the agents rest
	fails   atomic.Uint64 // of 1,000 requests of the leader
	term    uint64
	lead    *leadership
	ending  sync.WaitGroup // of the leaderships before it
	cancels []context.CancelFunc
	slow    time.Duration // the longest that a leadership took to end
	first   time.Duration // the longest until a new leader wrote
}

func newWorld(seed uint64, logs io.Writer) *world {
	w := &world{seed: seed, s: newStore(seed), rnd: rand.New(rand.NewPCG(seed, 1)), draws: map[string]uint64{}, loads: map[key]int64{}, jobLength: 20 * time.Second,
		log: slog.New(slog.DiscardHandler)}
	if logs != nil {
		w.log = slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	w.inv = watchInvariants(w.s)
	w.s.onEvict = w.inv.evicted
	w.agents = newAgents(w)
	for _, ns := range []string{"default", corev1.NamespaceNodeLease, "kube-system"} {
		w.namespace(ns)
	}
	w.storage = newStorage(w)
	w.deviceClass()
	return w
}

func (w *world) namespace(name string) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelMetadataName: name}}}
	if _, err := w.s.create(w.s.kinds[namespacesGVR], ns, "user"); err != nil {
		panic(err)
	}
}

// fault is a deliberate one, by which a test shows that the simulation can fail.
type fault struct {
	config   func(*scheduler.Config) // of every leadership
	misread  func(runtime.Object)
	miswrite func(query, runtime.Object)
	unfenced bool // deposed leaders go on and may write
}

// leadership is one leader's scheduler and controllers.
type leadership struct {
	term   uint64
	cancel context.CancelFunc
	done   chan error
}

// elect makes a new leader. From this instant the writes of the one before are refused; it learns of it, and stops, within lag.
func (w *world) elect(lag time.Duration) {
	old := w.lead
	w.term++
	term := w.term
	w.s.mu.Lock()
	if !w.fault.unfenced {
		w.s.fence = term
	}
	w.s.mu.Unlock()
	if old != nil {
		if lag > 0 {
			time.AfterFunc(lag, old.cancel)
		} else {
			old.cancel()
		}
		w.ending.Go(func() { w.await(old, lag) })
		w.cancels = append(w.cancels, old.cancel)
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := w.s.door(fmt.Sprintf("leader-%d", term), term)
	w.lead = &leadership{term: term, done: make(chan error, 1), cancel: func() {
		d.told.CompareAndSwap(0, time.Now().UnixNano())
		cancel()
	}}
	d.late = func(id string) {
		// Upstream's reconciler of slices takes no context: what it has begun it finishes, and the fence refuses it.
		if strings.Contains(id, "/endpointslices") {
			return
		}
		w.inv.mu.Lock()
		defer w.inv.mu.Unlock()
		w.inv.broken("the leader of term %d wrote after it was told to stop: %s", term, id)
	}
	d.fault, d.misread, d.miswrite = w.lose(term), w.fault.misread, w.fault.miswrite
	cfg := d.config()
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	client, err := kubernetes.NewForConfig(cfg)
	must(err)
	meta, err := metadata.NewForConfig(cfg)
	must(err)
	dyn, err := dynamic.NewForConfig(cfg)
	must(err)
	sc := scheduler.DefaultConfig()
	sc.Client, sc.Metadata, sc.Dynamic, sc.Health = client, meta, dyn, w.agents
	sc.PodCIDR, sc.RootCA = netip.MustParsePrefix("10.0.0.0/8"), []byte("ca")
	sc.Seed = draw(w.seed, "placement", term)
	sc.Autoscaling = scaling{w, d}
	sc.Quota = func(f informers.SharedInformerFactory) controller.Quota { return newUsage(f) }
	sc.Logger = w.log.With("term", term)
	if w.fault.config != nil {
		w.fault.config(&sc)
	}
	done := w.lead.done
	go func() { done <- scheduler.Run(ctx, sc) }()
}

// await notes how long a leadership took to end after it was told to.
func (w *world) await(l *leadership, lag time.Duration) {
	start := time.Now().Add(lag)
	err := <-l.done
	w.inv.mu.Lock()
	defer w.inv.mu.Unlock()
	w.slow = max(w.slow, time.Since(start))
	if err != nil {
		w.inv.broken("the leadership of term %d ended with: %v", l.term, err)
	}
	if took := time.Since(start); took > time.Second {
		w.inv.broken("the leadership of term %d took %v to end", l.term, took)
	}
}

var errSimulated = errors.New("simulated: the connection was lost")

// lose breaks requests at random while the API is flaky, and lets a test act after each write.
func (w *world) lose(term uint64) func(*http.Request, bool) error {
	var n atomic.Uint64
	return func(r *http.Request, done bool) error {
		if done && r.Method != http.MethodGet && w.afterWrite != nil {
			if err := w.afterWrite(r); err != nil {
				return err
			}
		}
		if f := w.fails.Load(); f > 0 && draw(w.seed, "fault", term, n.Add(1))%1000 < f {
			return errSimulated
		}
		return nil
	}
}

// stop ends the world and waits for its leader.
func (w *world) stop() {
	w.over.Store(true)
	for _, cancel := range w.cancels { // of those that have not been told yet
		cancel()
	}
	w.ending.Wait()
	if w.lead != nil {
		w.lead.cancel()
		w.await(w.lead, 0)
		w.lead = nil
	}
	time.Sleep(time.Minute) // an event that was on its way arrives
}
