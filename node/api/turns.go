package api

import (
	"container/list"
	"context"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	flowcontrol "k8s.io/api/flowcontrol/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilcache "k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	fq "k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing"
	fcrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"

	"skein.io/skein/node/api/internal/pause"
	"skein.io/skein/node/api/internal/stack"
)

// Priority and fairness shares out how many requests are worked on at once: hundreds, which suits a machine with dozens of processors. On one
// with two, fifty lists of one user at once are fifty goroutines in front of each step of anybody else's request. So the requests of one user
// take turns before that, a few at once for each processor: as many as keep all processors and the store busy when nobody else wants them,
// and no more.

// kind of request, by what it costs.
type kind int

const (
	reads  kind = iota // a moment of a processor
	writes             // a moment of a processor, and a wait for the store
	lists              // a processor for long; also the first list of a watch
	kindCount
)

// perProcessor is how many requests of a kind one user has under way for each processor while nobody else asks for anything.
var perProcessor = [kindCount]float64{reads: 4, writes: 8, lists: 0.5}

// inCompany is the same while others do. A processor has to be without work now and then: only then does Go's runtime look for what has
// come in from the network (else every 10 ms), and only then is a step of anybody else's request done at once.
var inCompany = [kindCount]float64{reads: 0.5, writes: 2, lists: 0.5}

const (
	// maxWaiting is how many requests of a kind one user may have waiting for their turn.
	maxWaiting = 1000
	// maxTurn is how long a request keeps others of its user waiting. What takes longer waits for something else than a processor, such as a client that
	// reads slowly or a webhook.
	maxTurn = 500 * time.Millisecond
	// punish is how long a request is held that will be refused: a client that does not heed refusals would ask again at once.
	punish = time.Second
	// companyFor is for how long after a request of somebody else's a user is not alone.
	companyFor = 5 * time.Second
)

// turns lets the requests of each user take turns.
type turns struct {
	utilflowcontrol.Interface
	alone, shared [kindCount]int

	mu    sync.Mutex // guards the rest
	users map[string]*line
	// last are the two who asked last, the latest first: whoever asks, one of them is somebody else.
	last [2]struct {
		name string
		at   time.Time
	}
}

// line is one user's. It is forgotten when it is empty.
type line struct {
	refs  int
	kinds [kindCount]struct {
		busy    int       // turns under way or at rest
		waiting list.List // of chan struct{}, closed when it is its turn
	}
}

func newTurns(next utilflowcontrol.Interface) *turns {
	t := &turns{Interface: next, users: map[string]*line{}}
	for k := range kindCount {
		t.alone[k] = max(1, int(perProcessor[k]*float64(runtime.GOMAXPROCS(0))))
		t.shared[k] = max(1, int(inCompany[k]*float64(runtime.GOMAXPROCS(0))))
	}
	return t
}

func kindOf(i *apirequest.RequestInfo) kind {
	switch i.Verb {
	case "list", "watch", "deletecollection":
		return lists
	case "get", "head", "options":
		return reads
	}
	return writes
}

// Handle implements utilflowcontrol.Interface.
func (t *turns) Handle(ctx context.Context, d utilflowcontrol.RequestDigest, note func(*flowcontrol.FlowSchema, *flowcontrol.PriorityLevelConfiguration, string),
	work func() fcrequest.WorkEstimate, queue fq.QueueNoteFn, exec func()) {
	if slices.Contains(d.User.GetGroups(), user.SystemPrivilegedGroup) || isProbe(d.RequestInfo) { // exempt, as there
		if name := d.User.GetName(); name != user.APIServerUser { // this process always has something to ask
			t.mu.Lock()
			t.note(name, time.Now())
			t.mu.Unlock()
		}
		t.Interface.Handle(ctx, d, note, work, queue, exec)
		return
	}
	k := kindOf(d.RequestInfo)
	end, ok := t.take(ctx, d.User.GetName(), k)
	if v, is := ctx.Value(verdictKey{}).(*verdict); is {
		v.refused.Store(!ok)
		if k == lists {
			v.crowd.Store(&crowd{t, d.User.GetName()})
		}
	}
	defer end()
	enough := time.AfterFunc(maxTurn, end)
	defer enough.Stop()
	t.Interface.Handle(ctx, d, note, work, queue, exec)
}

// isProbe tells whether a request asks for this server's health. Anonymous ones are all of one user.
func isProbe(i *apirequest.RequestInfo) bool {
	return !i.IsResourceRequest && slices.Contains([]string{"/livez", "/readyz", "/healthz"}, i.Path)
}

// take waits for a turn; end gives it back, once. False: there was none in time.
func (t *turns) take(ctx context.Context, name string, k kind) (end func(), ok bool) {
	now := time.Now()
	t.mu.Lock()
	l := t.enter(name, now)
	mine := &l.kinds[k]
	if mine.busy < t.limit(name, k, now) && mine.waiting.Len() == 0 {
		mine.busy++
		t.mu.Unlock()
		return t.give(name, l, k, now), true
	}
	turn := make(chan struct{})
	place := mine.waiting.PushBack(turn)
	crowd := mine.waiting.Len() > maxWaiting
	t.mu.Unlock()
	if crowd {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, punish)
		defer cancel()
	}
	select {
	case <-turn:
		return t.give(name, l, k, time.Now()), true
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-turn: // just now
		return t.give(name, l, k, time.Now()), true
	default:
	}
	mine.waiting.Remove(place)
	t.leave(name, l)
	return func() {}, false
}

// give makes the function that ends a turn. In company the next one of the same line begins as much later as this one took, so that one
// user leaves half of the time to others; who has nobody in line does not notice.
func (t *turns) give(name string, l *line, k kind, began time.Time) func() {
	return sync.OnceFunc(func() {
		now := time.Now()
		t.mu.Lock()
		defer t.mu.Unlock()
		if l.kinds[k].waiting.Len() > 0 && t.company(name, now) {
			time.AfterFunc(min(now.Sub(began), maxTurn), func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				t.next(name, l, k, time.Now())
			})
			return
		}
		t.next(name, l, k, now)
	})
}

// next ends a turn and begins as many as there may be. The caller has the lock.
func (t *turns) next(name string, l *line, k kind, now time.Time) {
	mine := &l.kinds[k]
	mine.busy--
	for mine.busy < t.limit(name, k, now) && mine.waiting.Len() > 0 {
		mine.busy++
		close(mine.waiting.Remove(mine.waiting.Front()).(chan struct{}))
	}
	t.leave(name, l)
}

// limit is how many turns of a kind a user may have at once. The caller has the lock.
func (t *turns) limit(name string, k kind, now time.Time) int {
	if t.company(name, now) {
		return t.shared[k]
	}
	return t.alone[k]
}

// company tells whether somebody else asked lately. The caller has the lock.
func (t *turns) company(name string, now time.Time) bool {
	other := t.last[0]
	if other.name == name {
		other = t.last[1]
	}
	return other.name != "" && now.Sub(other.at) < companyFor
}

// crowded tells whether a user has lists in line while others ask for something.
func (t *turns) crowded(name string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.users[name]
	return l != nil && l.kinds[lists].waiting.Len() > 0 && t.company(name, now)
}

// note remembers who asks. The caller has the lock.
func (t *turns) note(name string, now time.Time) {
	if t.last[0].name != name {
		t.last[1] = t.last[0]
	}
	t.last[0].name, t.last[0].at = name, now
}

// enter gives a user's line. The caller has the lock.
func (t *turns) enter(name string, now time.Time) *line {
	t.note(name, now)
	l := t.users[name]
	if l == nil {
		l = &line{}
		t.users[name] = l
	}
	l.refs++
	return l
}

// leave gives it back. The caller has the lock.
func (t *turns) leave(name string, l *line) {
	if l.refs--; l.refs == 0 {
		delete(t.users, name)
	}
}

// verdict carries a refusal from turns, which cannot answer, to where requests are answered, and whose list it is to where that is made.
type verdict struct {
	refused atomic.Bool
	crowd   atomic.Pointer[crowd]
}

type verdictKey = pause.Key

// crowd is a user whose lists may be in the way of others.
type crowd struct {
	turns *turns
	name  string
}

// maxRest is the longest pause within a list.
const maxRest = 5 * time.Millisecond

// Rest implements pause.Rester: of a user who has more lists in line, in company, one takes twice as long.
func (v *verdict) Rest(worked time.Duration) {
	if c := v.crowd.Load(); c != nil && c.turns.crowded(c.name, time.Now()) {
		time.Sleep(min(worked, maxRest))
	}
}

func withVerdict(r *http.Request) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), verdictKey{}, &verdict{}))
}

// refuse answers the requests that got no turn. It belongs behind upstream's filters.
func refuse(next http.Handler, codecs kruntime.NegotiatedSerializer) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, ok := r.Context().Value(verdictKey{}).(*verdict)
		if !ok || !v.refused.Load() {
			next.ServeHTTP(w, r)
			return
		}
		var gv schema.GroupVersion
		if i, ok := apirequest.RequestInfoFrom(r.Context()); ok {
			gv = schema.GroupVersion{Group: i.APIGroup, Version: i.APIVersion}
		}
		name := "nobody"
		if u, ok := apirequest.UserFrom(r.Context()); ok {
			name = u.GetName()
		}
		err := apierrors.NewTooManyRequests(fmt.Sprintf("too many requests of user %q wait for their turn on this server: send fewer at once", name), 1)
		responsewriters.ErrorNegotiated(err, codecs, gv, w, r)
	})
}

const (
	// failuresPerSecond is how many requests of one address may fail to authenticate without a delay, failuresAtOnce how many in a burst.
	failuresPerSecond, failuresAtOnce = 20, 100
	// maxStrangers bounds the addresses remembered.
	maxStrangers = 1024
)

// slowStrangers holds requests that nobody knows for a moment when many of them come from one address: each costs as much as one of
// somebody who may ask.
func slowStrangers(a authenticator.Request) authenticator.Request {
	addresses := utilcache.NewLRUExpireCache(maxStrangers)
	var mu sync.Mutex // of two requests of a new address one makes the entry
	limiter := func(address string) *rate.Limiter {
		mu.Lock()
		defer mu.Unlock()
		if l, ok := addresses.Get(address); ok {
			return l.(*rate.Limiter)
		}
		l := rate.NewLimiter(failuresPerSecond, failuresAtOnce)
		addresses.Add(address, l, time.Minute)
		return l
	}
	return authenticator.RequestFunc(func(r *http.Request) (*authenticator.Response, bool, error) {
		// All that follows runs in the goroutine that upstream's timeout filter has just started.
		if r.Method == http.MethodGet {
			stack.Medium()
		} else {
			stack.Large()
		}
		resp, ok, err := a.AuthenticateRequest(r)
		if ok && err == nil {
			return resp, ok, err
		}
		host, _, splitErr := net.SplitHostPort(r.RemoteAddr)
		if splitErr != nil {
			host = r.RemoteAddr
		}
		if !limiter(host).Allow() {
			select {
			case <-time.After(punish):
			case <-r.Context().Done():
			}
		}
		return resp, ok, err
	})
}
