// Package lastknown answers reads while the truth is out of reach, from what the node knew last, and says so: a Warning and an
// X-Skein-Age header tell how old that is. Writes and watches are never answered from it.
//
// There are two places to know things from. A replica whose shard has no leader has a whole copy of it: Filter notes how old a state
// a request accepts, the storages ask Use before they read the copy, and all that comes before and after them (authentication, RBAC,
// conversion, tables) is as ever. A node that reaches no replica has node/desired: New serves that, to whom it can recognise by itself.
//
// The state is the truth of some moment, never newer than any truth seen before by who asked this node, but older than what other nodes
// may know by now. So it is not given to nodes, which would take it for a fact and act on it - their own persisted copy is at least as
// good - unless they ask for it by MaxAgeHeader. Everything here may be used from any goroutine.
package lastknown

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/endpoints/responsewriter"

	"skein.io/skein/node/client"
)

// retryAfter is when a refused client should come again, in seconds.
const retryAfter = 1

// answer is what may be, and was, used of the past for one request.
type answer struct {
	max     time.Duration // the oldest state that the client accepts
	bounded bool          // it said so

	mu   sync.Mutex // guards the rest: a request that has timed out may still be worked on
	used bool
	age  time.Duration
	why  string
}

type answerKey struct{}

// readAsked tells how old a state a request accepts.
func readAsked(h http.Header) (*answer, error) {
	v := h.Get(client.MaxAgeHeader)
	if v == "" {
		return &answer{max: math.MaxInt64}, nil
	}
	s, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("header %s: %q is not a number of seconds", client.MaxAgeHeader, v))
	}
	return &answer{max: time.Duration(s) * time.Second, bounded: true}, nil
}

// use notes that a state is used, if the client accepts one as old.
func (a *answer) use(age time.Duration, why string) error {
	if age > a.max {
		return Unavailable(fmt.Sprintf("%s; the last known state is %s old, and at most %s was asked for", why, seconds(age), seconds(a.max)))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.used, a.age, a.why = true, max(a.age, age), why
	return nil
}

// show writes the headers of an answer from the past.
func (a *answer) show(h http.Header) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.used {
		return
	}
	h.Set(client.AgeHeader, strconv.FormatInt(int64(math.Ceil(a.age.Seconds())), 10))
	h.Add("Warning", fmt.Sprintf("299 - %q", fmt.Sprintf("last known state, %s old: %s", seconds(a.age), a.why)))
}

// seconds prints a duration as the headers count it: whole seconds, rounded up.
func seconds(d time.Duration) time.Duration {
	return time.Duration(math.Ceil(d.Seconds())) * time.Second
}

// Unavailable is the early refusal of what cannot be done now.
func Unavailable(message string) *apierrors.StatusError {
	e := apierrors.NewServiceUnavailable(message)
	e.ErrStatus.Details = &metav1.StatusDetails{RetryAfterSeconds: retryAfter}
	return e
}

// Filter lets the GET requests that h serves be answered from the past.
func Filter(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			h.ServeHTTP(w, r)
			return
		}
		a, err := readAsked(r.Header)
		if err != nil {
			refuse(w, err)
			return
		}
		if a.max == 0 {
			h.ServeHTTP(w, r)
			return
		}
		m := &marker{ResponseWriter: w, answer: a}
		h.ServeHTTP(responsewriter.WrapForHTTP1Or2(m), r.WithContext(context.WithValue(r.Context(), answerKey{}, a)))
	})
}

// AnyAge makes a request of the server's own be answered from the past, if that is all there is: what it checks ServiceAccount tokens by.
// Roles come from informers, which go on with what they know as well.
func AnyAge(ctx context.Context) context.Context {
	return context.WithValue(ctx, answerKey{}, &answer{max: math.MaxInt64, bounded: true})
}

// Use tells whether the request of ctx may be answered from a state of the past, and notes that it is. why says what keeps the node
// from the present. An error is the answer: the state is older than what the client accepts.
func Use(ctx context.Context, age time.Duration, why string) (bool, error) {
	a, _ := ctx.Value(answerKey{}).(*answer)
	info, _ := apirequest.RequestInfoFrom(ctx)
	if a == nil || info == nil || !info.IsResourceRequest || info.Verb != "get" && info.Verb != "list" {
		return false, nil
	}
	switch info.Subresource {
	case "exec", "attach", "portforward", "proxy": // GET is how they are written, but they do things
		return false, nil
	}
	if u, ok := apirequest.UserFrom(ctx); !ok || isNode(u) && !a.bounded {
		return false, nil
	}
	if err := a.use(age, why); err != nil {
		return false, err
	}
	return true, nil
}

func isNode(u user.Info) bool {
	for _, g := range u.GetGroups() {
		if g == user.NodesGroup {
			return true
		}
	}
	return false
}

// marker adds the headers when the answer begins.
type marker struct {
	http.ResponseWriter
	answer *answer
	begun  bool // used by the request's goroutine only
}

func (m *marker) Unwrap() http.ResponseWriter { return m.ResponseWriter }

func (m *marker) WriteHeader(code int) {
	m.begin()
	m.ResponseWriter.WriteHeader(code)
}

func (m *marker) Write(b []byte) (int, error) {
	m.begin()
	return m.ResponseWriter.Write(b)
}

func (m *marker) begin() {
	if !m.begun {
		m.begun = true
		m.answer.show(m.Header())
	}
}

// refuse answers with the Status of an error.
func refuse(w http.ResponseWriter, err error) {
	status := apierrors.APIStatus(apierrors.NewInternalError(err))
	if s, ok := err.(apierrors.APIStatus); ok {
		status = s
	}
	s := status.Status()
	s.Kind, s.APIVersion = "Status", "v1"
	b, merr := json.Marshal(&s)
	if merr != nil {
		panic(merr) // strings and numbers only
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if s.Details != nil && s.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(s.Details.RetryAfterSeconds)))
	}
	w.WriteHeader(int(s.Code))
	_, _ = w.Write(b) // fails when the client has gone
}
