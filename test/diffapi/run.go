package diffapi

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/cbor/direct"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

const (
	// commandTimeout ends what hangs; nothing here takes seconds.
	commandTimeout = 40 * time.Second
	// slow is what a case may take without being named.
	slow = 5 * time.Second
	// large is what nobody reads: OpenAPI documents, which are the same to the byte or not.
	large = 150 << 10
	// untilTimeout is how long a case may be repeated.
	untilTimeout = 30 * time.Second
)

// target is one of the two servers.
type target struct {
	name    string
	host    string // IP:PORT
	admin   *http.Client
	nobody  *http.Client
	kubectl string // executable
	dir     string // of its own, for kubectl's files
	pki     *pki
	saved   map[string]string
	body    string // of the last answer
}

// run gives the masked outputs of all cases of an area.
func (t *target) run(ctx context.Context, a *Area) ([]string, error) {
	t.saved = map[string]string{"NS": a.Name}
	if err := t.prepare(ctx, a.Name); err != nil {
		return nil, fmt.Errorf("%s: %w", t.name, err)
	}
	out := make([]string, len(a.Cases))
	for i, c := range a.Cases {
		began := time.Now()
		var err error
		if out[i], err = t.runCase(ctx, a, c); err != nil {
			return nil, fmt.Errorf("%s: %s, line %d: %w", t.name, a.Name, c.Line, err)
		}
		if d := time.Since(began); d > slow {
			fmt.Printf("%s took %s at %s\n", t.name, d.Round(100*time.Millisecond), c.ID)
		}
	}
	return out, nil
}

// prepare makes the namespace of an area and what a controller would put there, and a configuration of kubectl.
func (t *target) prepare(ctx context.Context, ns string) error {
	for _, step := range [][2]string{
		{"/api/v1/namespaces", `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"` + ns + `"}}`},
		{"/api/v1/namespaces/" + ns + "/serviceaccounts", `{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"default"}}`},
	} {
		path, body := step[0], step[1]
		err := retry(ctx, func() error {
			r, err := t.send(ctx, &Case{Method: http.MethodPost, Path: path, Body: body, Header: http.Header{}})
			if err == nil && r.code != http.StatusCreated && r.code != http.StatusConflict {
				err = fmt.Errorf("%s: %d %s", path, r.code, r.body)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(t.dir, "kubeconfig"), t.pki.kubeconfig(t.host, ns), 0o600)
}

// retry is for what depends on an earlier step that the server may not have seen everywhere.
func retry(ctx context.Context, f func() error) error {
	end := time.Now().Add(untilTimeout)
	for {
		err := f()
		if err == nil || time.Now().After(end) || ctx.Err() != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond) // a server that starts cannot be asked to tell
	}
}

func (t *target) runCase(ctx context.Context, a *Area, c *Case) (string, error) {
	var out string
	err := retry(ctx, func() (err error) {
		if c.Kubectl != nil {
			out, err = t.runKubectl(ctx, c)
		} else {
			out, err = t.runRaw(ctx, c)
		}
		if err != nil {
			return err
		}
		if !strings.Contains(out, c.Until) && !strings.Contains(t.body, c.Until) {
			return errors.New("wait")
		}
		return nil
	})
	if err != nil && err.Error() != "wait" { // what never came shows in the output
		return "", err
	}
	return c.shape(sortManaged(mask(c.pick(out), t.host))), nil
}

func (t *target) expand(s string) string {
	for k, v := range t.saved {
		s = strings.ReplaceAll(s, "${"+k+"}", v)
	}
	return s
}

func (t *target) runKubectl(ctx context.Context, c *Case) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	args := make([]string, len(c.Kubectl))
	for i, a := range c.Kubectl {
		args[i] = t.expand(a)
	}
	cmd := exec.CommandContext(ctx, t.kubectl, args...)
	cmd.Dir = t.dir
	cmd.Env = []string{"HOME=" + t.dir, "KUBECONFIG=" + filepath.Join(t.dir, "kubeconfig"), "KUBECACHEDIR=" + filepath.Join(t.dir, "cache"), "TZ=UTC", "PATH=" + os.Getenv("PATH"), "GOGC=off", "GOMEMLIMIT=500MiB"}
	cmd.Stdin = strings.NewReader(t.expand(c.Body))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	if err := t.keep(c, out.Bytes()); err != nil {
		return "", err
	}
	text := out.String()
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	text += errs.String()
	if exit != nil {
		text = strings.TrimRight(text, "\n") + "\n" + exit.String() + "\n"
	}
	if c.Text {
		text = maskAges(text)
	}
	return text, nil
}

var errNoAnswer = errors.New("no answer")

// answer is what came back for a raw request.
type answer struct {
	code   int
	header http.Header
	body   []byte
	broken error // the body ended early
}

func (t *target) send(ctx context.Context, c *Case) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	body := []byte(t.expand(c.Body))
	contentType := "application/json"
	if c.Encode != "" {
		var err error
		if body, contentType, err = encode(body, c.Encode); err != nil {
			return nil, err
		}
	}
	r, err := http.NewRequestWithContext(ctx, c.Method, "https://"+t.host, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if r.URL, err = url.Parse("https://" + t.host + t.expand(c.Path)); err != nil {
		path, query, _ := strings.Cut(t.expand(c.Path), "?")
		r.URL = &url.URL{Scheme: "https", Host: t.host, Opaque: "//" + t.host + path, RawQuery: query} // as it is, however odd
	}
	if len(body) > 0 {
		r.Header.Set("Content-Type", contentType)
	}
	for k, vs := range c.Header {
		r.Header.Del(k)
		for _, v := range vs {
			if v != "" {
				r.Header.Add(k, t.expand(v))
			}
		}
	}
	client := t.admin
	if c.Anonymous {
		client = t.nobody
	}
	resp, err := client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	defer resp.Body.Close()
	a := &answer{code: resp.StatusCode, header: resp.Header}
	a.body, a.broken = io.ReadAll(resp.Body)
	return a, nil
}

func (t *target) runRaw(ctx context.Context, c *Case) (string, error) {
	a, err := t.send(ctx, c)
	if errors.Is(err, errNoAnswer) { // the servers may close a connection under a body that they do not want
		return "no answer\n", nil
	}
	if err != nil {
		return "", err
	}
	if z := a.header.Get("Content-Encoding"); z == "gzip" { // how well it is packed does not matter
		if a.body, err = unpack(a.body); err != nil {
			return "", err
		}
	}
	t.body = string(a.body)
	text, err := show(a.header.Get("Content-Type"), a.body, c.Only == nil)
	if err != nil {
		return "", err
	}
	if err := t.keep(c, a.body); err != nil {
		return "", err
	}
	if a.broken != nil {
		text += "\nbroken off\n"
	}
	return fmt.Sprintf("%d\n%s\n%s", a.code, showHeader(a.header), text), nil
}

func unpack(b []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

// show makes a body readable without hiding anything: the order of fields stays. A large one may be shortened to its hash.
func show(contentType string, body []byte, short bool) (string, error) {
	switch {
	case short && len(body) > large:
		return fmt.Sprintf("%d bytes with SHA-256 %x", len(body), sha256.Sum256(body)), nil
	case strings.HasPrefix(contentType, "application/json"):
		return showJSON(body), nil
	case strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf;stream"):
		return fmt.Sprintf("%d bytes of protobuf frames", len(body)), nil
	case strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf"):
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
		if err != nil {
			return fmt.Sprintf("protobuf that the client does not know: %v", err), nil
		}
		b, err := json.MarshalIndent(o, "", "  ")
		return string(b), err
	case strings.HasPrefix(contentType, "application/cbor"):
		var v any
		if err := direct.Unmarshal(body, &v); err != nil {
			return fmt.Sprintf("CBOR that cannot be read: %v", err), nil
		}
		b, err := json.MarshalIndent(v, "", "  ")
		return string(b), err
	}
	if !utf8.Valid(body) {
		return fmt.Sprintf("%d bytes with SHA-256 %x", len(body), sha256.Sum256(body)), nil
	}
	return string(body), nil
}

// showJSON indents each of the values that follow each other.
func showJSON(body []byte) string {
	var out bytes.Buffer
	for d := json.NewDecoder(bytes.NewReader(body)); ; {
		var v json.RawMessage
		if err := d.Decode(&v); err == io.EOF {
			break
		} else if err != nil {
			return string(body)
		}
		_ = json.Indent(&out, v, "", "  ") // it was just decoded
		out.WriteByte('\n')
	}
	return ageInTable.ReplaceAllString(out.String(), `$1"AGE"$4`)
}

// encode turns YAML of a built-in kind into what protobuf and CBOR clients send.
func encode(body []byte, how string) (out []byte, contentType string, err error) {
	switch how {
	case "protobuf":
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
		if err != nil {
			return nil, "", err
		}
		out, err := runtime.Encode(protobuf.NewSerializer(scheme.Scheme, scheme.Scheme), o)
		return out, "application/vnd.kubernetes.protobuf", err
	case "cbor":
		var v any
		if err := yaml.Unmarshal(body, &v); err != nil {
			return nil, "", err
		}
		out, err := direct.Marshal(v)
		return out, "application/cbor", err
	}
	return nil, "", fmt.Errorf("unknown encoding %q", how)
}

// keep saves what later cases refer to.
func (t *target) keep(c *Case, body []byte) error {
	for name, path := range c.Save {
		if path == "" {
			t.saved[name] = strings.TrimSpace(string(body))
			continue
		}
		var v any
		if err := json.Unmarshal(body, &v); err != nil {
			return fmt.Errorf("save %s: %w", name, err)
		}
		for step := range strings.SplitSeq(path, ".") {
			switch x := v.(type) {
			case map[string]any:
				v = x[step]
			case []any:
				i, err := strconv.Atoi(step)
				if err != nil || i >= len(x) {
					return fmt.Errorf("save %s: no element %s", name, step)
				}
				v = x[i]
			default:
				return fmt.Errorf("save %s: nothing at %s in %.300s", name, step, body)
			}
		}
		t.saved[name] = fmt.Sprint(v)
	}
	return nil
}
