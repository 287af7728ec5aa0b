package api

import (
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

// perProcessor is how many requests of a kind one user has under way for each processor. Lists leave half of the processors free.
var perProcessor = [kindCount]float64{reads: 4, writes: 8, lists: 0.5}

const (
	// maxWaiting is how many requests of a kind one user may have waiting for their turn.
	maxWaiting = 1000
	// maxTurn is how long a list keeps others of its user waiting: a client that reads slowly is not to block others of the same name.
	maxTurn = 500 * time.Millisecond
	// punish is how long a request is held that will be refused: a client that does not heed refusals would ask again at once.
	punish = time.Second
)

// turns lets the requests of each user take turns.
type turns struct {
	utilflowcontrol.Interface
	limit [kindCount]int

	mu    sync.Mutex // guards users
	users map[string]*line
}

// line is one user's. It is forgotten when it is empty.
type line struct {
	refs  int // guarded by turns.mu
	kinds [kindCount]struct {
		slots   chan struct{}
		waiting atomic.Int32
	}
}

func newTurns(next utilflowcontrol.Interface) *turns {
	t := &turns{Interface: next, users: map[string]*line{}}
	for k, n := range perProcessor {
		t.limit[k] = max(1, int(n*float64(runtime.GOMAXPROCS(0))))
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
		t.Interface.Handle(ctx, d, note, work, queue, exec)
		return
	}
	k := kindOf(d.RequestInfo)
	end, ok := t.take(ctx, d.User.GetName(), k)
	if !ok {
		if v, ok := ctx.Value(verdictKey{}).(*verdict); ok {
			v.refused.Store(true)
		}
	}
	defer end()
	if k == lists {
		enough := time.AfterFunc(maxTurn, end)
		defer enough.Stop()
	}
	t.Interface.Handle(ctx, d, note, work, queue, exec)
}

// isProbe tells whether a request asks for this server's health. Anonymous ones are all of one user.
func isProbe(i *apirequest.RequestInfo) bool {
	return !i.IsResourceRequest && slices.Contains([]string{"/livez", "/readyz", "/healthz"}, i.Path)
}

// take waits for a turn; end gives it back, once. False: there was none in time.
func (t *turns) take(ctx context.Context, name string, k kind) (end func(), ok bool) {
	l := t.enter(name)
	mine := &l.kinds[k]
	give := sync.OnceFunc(func() {
		<-mine.slots
		t.leave(name, l)
	})
	select {
	case mine.slots <- struct{}{}:
		return give, true
	default:
	}
	wait, crowd := ctx, mine.waiting.Add(1) > maxWaiting
	defer mine.waiting.Add(-1)
	if crowd {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, punish)
		defer cancel()
	}
	select {
	case mine.slots <- struct{}{}:
		return give, true
	case <-wait.Done():
		t.leave(name, l)
		return func() {}, false
	}
}

func (t *turns) enter(name string) *line {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.users[name]
	if l == nil {
		l = &line{}
		for k := range l.kinds {
			l.kinds[k].slots = make(chan struct{}, t.limit[k])
		}
		t.users[name] = l
	}
	l.refs++
	return l
}

func (t *turns) leave(name string, l *line) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l.refs--; l.refs == 0 {
		delete(t.users, name)
	}
}

// verdict carries a refusal from turns, which cannot answer, to where requests are answered.
type verdict struct{ refused atomic.Bool }

type verdictKey struct{}

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
