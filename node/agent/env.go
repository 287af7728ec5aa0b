package agent

import (
	"fmt"
	"net"
	"sort"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"

	"skein.io/skein/node/volume"
)

// envVar is one variable; a container's variables keep their order.
type envVar struct{ Name, Value string }

// envSource is what variables are taken from.
type envSource interface {
	volume.Source
	Services() []*corev1.Service
}

// expand replaces $(NAME) by its value; an unknown one stays as it is, $$ is a dollar sign. missing is called for unknown
// names; it may be nil.
func expand(s string, get func(string) (string, bool), missing func(string)) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		switch s[i+1] {
		case '$':
			b.WriteByte('$')
			i++
		case '(':
			end := strings.IndexByte(s[i+2:], ')')
			if end < 0 {
				b.WriteString("$(")
				i++
				continue
			}
			name := s[i+2 : i+2+end]
			if v, ok := get(name); ok {
				b.WriteString(v)
			} else {
				if missing != nil {
					missing(name)
				}
				b.WriteString("$(" + name + ")")
			}
			i += 2 + end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}

func lookupEnv(env []envVar) func(string) (string, bool) {
	m := make(map[string]string, len(env))
	for _, e := range env {
		m[e.Name] = e.Value
	}
	return func(n string) (string, bool) { v, ok := m[n]; return v, ok }
}

// serviceEnv are the variables of Services: those of the pod's namespace when it wants them, and always the API's.
func serviceEnv(services []*corev1.Service, namespace string, links bool) map[string]string {
	m := map[string]string{}
	for _, s := range services {
		api := s.Namespace == corev1.NamespaceDefault && s.Name == "kubernetes"
		if s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone || len(s.Spec.Ports) == 0 || !api && (!links || s.Namespace != namespace) {
			continue
		}
		if api && m["KUBERNETES_SERVICE_HOST"] != "" && namespace != corev1.NamespaceDefault {
			continue // the namespace's own Service of this name wins
		}
		name := envName(s.Name)
		m[name+"_SERVICE_HOST"] = s.Spec.ClusterIP
		m[name+"_SERVICE_PORT"] = strconv.Itoa(int(s.Spec.Ports[0].Port))
		for i, p := range s.Spec.Ports {
			if p.Name != "" {
				m[name+"_SERVICE_PORT_"+envName(p.Name)] = strconv.Itoa(int(p.Port))
			}
			proto := string(p.Protocol)
			if proto == "" {
				proto = string(corev1.ProtocolTCP)
			}
			url := strings.ToLower(proto) + "://" + net.JoinHostPort(s.Spec.ClusterIP, strconv.Itoa(int(p.Port)))
			if i == 0 {
				m[name+"_PORT"] = url
			}
			prefix := fmt.Sprintf("%s_PORT_%d_%s", name, p.Port, strings.ToUpper(proto))
			m[prefix], m[prefix+"_PROTO"] = url, strings.ToLower(proto)
			m[prefix+"_PORT"], m[prefix+"_ADDR"] = strconv.Itoa(int(p.Port)), s.Spec.ClusterIP
		}
	}
	return m
}

func envName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }

// environment resolves all variables of a container.
func environment(src envSource, pod *corev1.Pod, c *corev1.Container, facts volume.PodFacts) ([]envVar, error) {
	links := pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks
	services := serviceEnv(src.Services(), pod.Namespace, links)
	var out []envVar
	index := map[string]int{}
	set := func(n, v string) {
		if i, ok := index[n]; ok {
			out[i].Value = v
			return
		}
		index[n] = len(out)
		out = append(out, envVar{n, v})
	}
	for i := range c.EnvFrom {
		if err := envFrom(src, pod.Namespace, &c.EnvFrom[i], set); err != nil {
			return nil, err
		}
	}
	get := func(n string) (string, bool) {
		if i, ok := index[n]; ok {
			return out[i].Value, true
		}
		v, ok := services[n]
		return v, ok
	}
	for i := range c.Env {
		e := &c.Env[i]
		if e.ValueFrom == nil {
			set(e.Name, expand(e.Value, get, nil))
			continue
		}
		v, ok, err := envValue(src, pod, c, facts, e.ValueFrom)
		if err != nil {
			return nil, err
		}
		if ok {
			set(e.Name, v)
		}
	}
	names := make([]string, 0, len(services))
	for n := range services {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		if _, ok := index[n]; !ok {
			set(n, services[n])
		}
	}
	return out, nil
}

// envFrom takes all keys of a ConfigMap or Secret. Keys that cannot be variable names are left out, as by kubelet.
func envFrom(src volume.Source, ns string, f *corev1.EnvFromSource, set func(n, v string)) error {
	data := map[string]string{}
	switch {
	case f.ConfigMapRef != nil:
		m, err := src.ConfigMap(ns, f.ConfigMapRef.Name)
		if err != nil {
			if apierrors.IsNotFound(err) && isTrue(f.ConfigMapRef.Optional) {
				return nil
			}
			return err
		}
		data = m.Data
	case f.SecretRef != nil:
		s, err := src.Secret(ns, f.SecretRef.Name)
		if err != nil {
			if apierrors.IsNotFound(err) && isTrue(f.SecretRef.Optional) {
				return nil
			}
			return err
		}
		for k, v := range s.Data {
			data[k] = string(v)
		}
	}
	keys := make([]string, 0, len(data))
	for k := range data {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		if n := f.Prefix + k; len(validation.IsRelaxedEnvVarName(n)) == 0 {
			set(n, data[k])
		}
	}
	return nil
}

// envValue resolves valueFrom; false: an optional source is missing, and so is the variable.
func envValue(src volume.Source, pod *corev1.Pod, c *corev1.Container, facts volume.PodFacts, f *corev1.EnvVarSource) (string, bool, error) {
	switch {
	case f.FieldRef != nil:
		v, err := volume.FieldValue(pod, facts, f.FieldRef.FieldPath)
		return v, err == nil, err
	case f.ResourceFieldRef != nil:
		v, err := volume.ResourceValue(pod, c, facts, f.ResourceFieldRef)
		return v, err == nil, err
	case f.ConfigMapKeyRef != nil:
		r := f.ConfigMapKeyRef
		m, err := src.ConfigMap(pod.Namespace, r.Name)
		if err != nil {
			return "", false, optionalErr(err, r.Optional)
		}
		v, ok := m.Data[r.Key]
		if !ok && !isTrue(r.Optional) {
			return "", false, fmt.Errorf("couldn't find key %v in ConfigMap %v/%v", r.Key, pod.Namespace, r.Name)
		}
		return v, ok, nil
	case f.SecretKeyRef != nil:
		r := f.SecretKeyRef
		s, err := src.Secret(pod.Namespace, r.Name)
		if err != nil {
			return "", false, optionalErr(err, r.Optional)
		}
		v, ok := s.Data[r.Key]
		if !ok && !isTrue(r.Optional) {
			return "", false, fmt.Errorf("couldn't find key %v in Secret %v/%v", r.Key, pod.Namespace, r.Name)
		}
		return string(v), ok, nil
	}
	return "", false, fmt.Errorf("a variable's source is of a kind this node does not support (supported: fieldRef, resourceFieldRef, configMapKeyRef, secretKeyRef)")
}

func optionalErr(err error, optional *bool) error {
	if apierrors.IsNotFound(err) && isTrue(optional) {
		return nil
	}
	return err
}

func isTrue(b *bool) bool { return b != nil && *b }
