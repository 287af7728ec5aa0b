package api

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

// Limits bound what one server does at once. The zero value of a field means its default.
type Limits struct {
	// Reads and Writes are how many requests of each kind are worked on at once, watches and streams not counted. Priority and fairness shares the
	// sum out, and lets others wait in line. Defaults: upstream's 400 and 200.
	Reads, Writes int
	// Body is the most that a request may carry, in bytes; larger ones are answered 413. Default: upstream's 3 MiB.
	Body int64
	// Watches is how many may be open; more are answered 429. A quarter of them is kept for nodes and administrators. Default 10,000.
	Watches int
	// UserWatches is how many of them one user may have, nodes and administrators as well. Default 1,000.
	UserWatches int
}

func (l *Limits) setDefaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&l.Reads, 400)
	def(&l.Writes, 200)
	def(&l.Watches, 10_000)
	def(&l.UserWatches, 1_000)
	if l.Body == 0 {
		l.Body = 3 << 20
	}
}

// minBody is what a body must be allowed to have for the largest objects that upstream itself makes (a Secret of 1 MiB in base64).
const minBody = 3 << 19

// Validate reports every fault at once.
func (l Limits) Validate() error {
	l.setDefaults()
	var errs []error
	for _, n := range []struct {
		what string
		v    int
	}{{"reads", l.Reads}, {"writes", l.Writes}, {"watches", l.Watches}, {"watches of a user", l.UserWatches}} {
		if n.v < 1 {
			errs = append(errs, fmt.Errorf("API limits: %d %s at once: want one or more", n.v, n.what))
		}
	}
	if l.Body < minBody {
		errs = append(errs, fmt.Errorf("API limits: bodies of %d bytes: want %d or more, else Secrets of a legal size are refused", l.Body, minBody))
	}
	return errors.Join(errs...)
}

// watchRetry is what a refused watch is told to wait, in seconds.
const watchRetry = 5

// watchLimit counts open watches.
type watchLimit struct {
	total, perUser int
	codecs         runtime.NegotiatedSerializer

	mu     sync.Mutex // guards the rest
	open   int
	byUser map[string]int
}

func newWatchLimit(l Limits, codecs runtime.NegotiatedSerializer) *watchLimit {
	return &watchLimit{total: l.Watches, perUser: l.UserWatches, codecs: codecs, byUser: map[string]int{}}
}

// take counts a watch of a user, or says why there is no room for it.
func (l *watchLimit) take(u user.Info) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	name, total := u.GetName(), l.total
	if !slices.ContainsFunc(u.GetGroups(), func(g string) bool { return g == user.NodesGroup || g == user.SystemPrivilegedGroup }) {
		total -= l.total / 4
	}
	switch mine := l.byUser[name]; {
	case mine >= l.perUser:
		return fmt.Errorf("user %q has %d watches open on this server, as many as one user may have: close some of them", name, mine)
	case l.open >= total:
		return fmt.Errorf("%d watches are open on this server, as many as it lets this user have part in (%d of them are of %q): try again later, or through another node",
			l.open, mine, name)
	}
	l.open++
	l.byUser[name]++
	return nil
}

func (l *watchLimit) give(u user.Info) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.byUser[u.GetName()]--; l.byUser[u.GetName()] == 0 {
		delete(l.byUser, u.GetName())
	}
}

// bound refuses watches beyond the limits. It expects upstream's filters before it. This process' own are not counted: without them the
// server could not work.
func (l *watchLimit) bound(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, ok := apirequest.RequestInfoFrom(r.Context())
		u, known := apirequest.UserFrom(r.Context())
		if !ok || !known || info.Verb != "watch" || u.GetName() == user.APIServerUser {
			next.ServeHTTP(w, r)
			return
		}
		if err := l.take(u); err != nil {
			gv := schema.GroupVersion{Group: info.APIGroup, Version: info.APIVersion}
			responsewriters.ErrorNegotiated(apierrors.NewTooManyRequests(err.Error(), watchRetry), l.codecs, gv, w, r)
			return
		}
		defer l.give(u)
		next.ServeHTTP(w, r)
	})
}
