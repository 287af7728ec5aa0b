//go:build openapigen

package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/serializer"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/util/compatibility"
	"k8s.io/client-go/rest"
	generated "k8s.io/kubernetes/pkg/generated/openapi"

	"skein.io/skein/node/api/resourcemetrics"
)

// renderMetrics writes the documents of metrics.k8s.io, which is no part of kube-apiserver: rendered as metrics-server does it, from upstream's definitions.
func renderMetrics(out string) error {
	info := resourcemetrics.Group(resourcemetrics.Config{})
	c := genericapiserver.NewConfig(serializer.NewCodecFactory(info.Scheme))
	c.EffectiveVersion = compatibility.DefaultBuildEffectiveVersion()
	c.ExternalAddress = "192.0.2.10:443"
	c.LoopbackClientConfig = &rest.Config{Host: c.ExternalAddress}
	c.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(generated.GetOpenAPIDefinitions, openapinamer.NewDefinitionNamer(info.Scheme))
	c.OpenAPIV3Config.Info.Title = "Kubernetes"
	s, err := c.Complete(nil).New("metrics", genericapiserver.NewEmptyDelegate())
	if err != nil {
		return err
	}
	if err := s.InstallAPIGroup(&info); err != nil {
		return err
	}
	s.PrepareRun()
	for _, path := range []string{"apis/metrics.k8s.io", "apis/metrics.k8s.io/v1beta1"} {
		r := httptest.NewRequest(http.MethodGet, "/openapi/v3/"+path, nil)
		r.Header.Set("Accept", "application/json")
		w := httptest.NewRecorder()
		s.Handler.Director.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			return fmt.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
		if err := write(filepath.Join(out, "v3", strings.ReplaceAll(path, "/", "__")+".json.gz"), w.Body.Bytes()); err != nil {
			return err
		}
	}
	return nil
}
