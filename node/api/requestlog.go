package api

import (
	"bufio"
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	flowcontrol "k8s.io/api/flowcontrol/v1"
	auditapi "k8s.io/apiserver/pkg/apis/audit"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/endpoints/responsewriter"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	fq "k8s.io/apiserver/pkg/util/flowcontrol/fairqueuing"
	fcrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"
)

// requestLog writes a line for each request when it has ended.
type requestLog struct {
	log   *slog.Logger
	level slog.Level
}

// enabled tells whether lines would be seen. Without it none of the below is put in the way of requests.
func (l requestLog) enabled() bool { return l.log.Enabled(context.Background(), l.level) }

// note is what the inner filters know of a request. A request that took too long is answered while they are still at work.
type note struct {
	mu             sync.Mutex // guards the rest
	verb, resource string
	user           string
	flow, level    string // of priority and fairness
	queued         time.Duration
}

type noteKey struct{}

// wrap logs what next serves. It belongs around all of upstream's filters.
func (l requestLog) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began, n, seen := time.Now(), &note{}, &answer{ResponseWriter: w}
		defer func() { l.line(r, n, seen, began) }() // also when the handler breaks the connection
		next.ServeHTTP(responsewriter.WrapForHTTP1Or2(seen), r.WithContext(context.WithValue(r.Context(), noteKey{}, n)))
	})
}

func (l requestLog) line(r *http.Request, n *note, seen *answer, began time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	verb := n.verb
	if verb == "" {
		verb = r.Method
	}
	l.log.LogAttrs(r.Context(), l.level, "request", slog.String("verb", verb), slog.String("resource", n.resource), slog.String("uri", r.URL.RequestURI()),
		slog.Int("status", seen.status), slog.Duration("latency", time.Since(began)), slog.Duration("queued", n.queued), slog.Int64("bytes", seen.bytes),
		slog.String("user", n.user), slog.String("userAgent", r.UserAgent()), slog.String("source", r.RemoteAddr),
		slog.String("flowSchema", n.flow), slog.String("priorityLevel", n.level), slog.String("auditID", seen.Header().Get(auditapi.HeaderAuditID)))
}

// known notes who asks for what; it belongs behind authentication.
func known(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, _ := apirequest.RequestInfoFrom(r.Context())
		if u, ok := apirequest.UserFrom(r.Context()); ok && info != nil {
			noted(r.Context(), func(n *note) { n.who(info, u.GetName()) })
		}
		next.ServeHTTP(w, r)
	})
}

func (n *note) who(i *apirequest.RequestInfo, user string) {
	n.verb, n.resource, n.user = i.Verb, i.Resource, user
	if i.Subresource != "" {
		n.resource += "/" + i.Subresource
	}
	if i.APIGroup != "" {
		n.resource += "." + i.APIGroup
	}
}

func noted(ctx context.Context, f func(*note)) {
	if n, ok := ctx.Value(noteKey{}).(*note); ok {
		n.mu.Lock()
		defer n.mu.Unlock()
		f(n)
	}
}

// notedFlow notes how priority and fairness classifies requests, and how long it lets them wait.
type notedFlow struct{ utilflowcontrol.Interface }

// Handle implements utilflowcontrol.Interface.
func (f notedFlow) Handle(ctx context.Context, d utilflowcontrol.RequestDigest, noteFn func(*flowcontrol.FlowSchema, *flowcontrol.PriorityLevelConfiguration, string),
	work func() fcrequest.WorkEstimate, queue fq.QueueNoteFn, exec func()) {
	began := time.Now()
	classified := func(fs *flowcontrol.FlowSchema, pl *flowcontrol.PriorityLevelConfiguration, flow string) {
		noted(ctx, func(n *note) {
			n.who(d.RequestInfo, d.User.GetName())
			n.flow, n.level = fs.Name, pl.Name
		})
		noteFn(fs, pl, flow)
	}
	f.Interface.Handle(ctx, d, classified, work, queue, func() {
		noted(ctx, func(n *note) { n.queued = time.Since(began) })
		exec()
	})
}

// answer sees what a handler answers.
type answer struct {
	http.ResponseWriter
	status int
	bytes  int64
}

var _ responsewriter.UserProvidedDecorator = (*answer)(nil)

// Unwrap implements responsewriter.UserProvidedDecorator.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) WriteHeader(code int) {
	if a.status == 0 || a.status < http.StatusOK {
		a.status = code
	}
	a.ResponseWriter.WriteHeader(code)
}

func (a *answer) Write(b []byte) (int, error) {
	if a.status == 0 {
		a.status = http.StatusOK
	}
	n, err := a.ResponseWriter.Write(b)
	a.bytes += int64(n)
	return n, err
}

// Hijack gives the connection away, as to a stream of exec.
func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	a.status = http.StatusSwitchingProtocols
	return a.ResponseWriter.(http.Hijacker).Hijack()
}
